"""Text files as documents: one file, one document; .gz and .zst are decompressed."""

from collections.abc import Iterable
from typing import Annotated, Self

from pydantic import Field

from mlt.config.problems import Problem
from mlt.data.compressed import open_binary
from mlt.data.sources import Documents, Source, decode_utf8, find_files, require_files


class TextFiles(Source):
    """UTF-8 text files; each file is one document.

    Attributes:
        paths: files, folders (every file below them) or patterns such as `books/**/*.txt`, relative to the
            directory the command runs in.
    """

    paths: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]

    def documents(self) -> Documents:
        """The files in the order of `paths`, sorted within each.

        Raises UserError if one is missing; reading a document raises BadRecord if it is not UTF-8, with file and byte.
        """
        files = require_files(self.paths, "TextFiles")

        def read(document: int) -> str:
            with open_binary(files[document]) as file:
                return decode_utf8(file.read(), files[document])

        return Documents(origin=f"text files {', '.join(self.paths)}", names=files, read=read)

    def file_problems(self) -> Iterable[Problem]:
        return find_files(self.paths)[1]

    @classmethod
    def example(cls) -> Self:
        return cls(paths=("books/**/*.txt",))
