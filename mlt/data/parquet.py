"""Parquet files as documents: one row, one document."""

from bisect import bisect_right
from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate
from typing import Annotated, Any, Self

from pydantic import Field

from mlt.config.problems import Problem
from mlt.data.arrow_text import ARROW, check_column, text_of
from mlt.data.sources import Documents, Positions, Source, find_files, package_problem, require_files, require_package
from mlt.errors import UserError

_SUFFIXES = (".parquet", ".pq")


class Parquet(Source):
    """Parquet files: each row is a document, one column of which is the text. Needs the package pyarrow.

    One row group is in memory at a time, and of it the text column alone.

    Attributes:
        paths: files, folders (every .parquet and .pq file below them) or patterns such as `data/*.parquet`, relative to the
            directory the command runs in.
        column: name of the column that holds the text.
    """

    paths: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
    column: Annotated[str, Field(min_length=1)] = "text"

    def documents(self) -> Documents:
        """The rows of all files in order; names are `file:row`, rows from 0.

        Raises UserError if a file is missing, is not Parquet or lacks the column; reading a document raises BadRecord if it
        is null or not UTF-8.
        """
        require_package(*ARROW)
        files = require_files(self.paths, "Parquet", _SUFFIXES)
        groups = [_group_ends(path, self.column) for path in files]
        names = Positions(files, [ends[-1] if ends else 0 for ends in groups])
        group_of = lru_cache(maxsize=1)(lambda file, group: _read_group(files[file], group, self.column))

        def read(document: int) -> str:
            file, row = names.place(document)
            group = bisect_right(groups[file], row)
            first = groups[file][group - 1] if group else 0
            return text_of(group_of(file, group), row - first, names[document], self.column)

        return Documents(origin=f"Parquet files {', '.join(self.paths)}", names=names, read=read)

    def file_problems(self) -> Iterable[Problem]:
        missing = package_problem(*ARROW)
        return [*find_files(self.paths, _SUFFIXES)[1], *([missing] if missing else [])]

    @classmethod
    def example(cls) -> Self:
        return cls(paths=("data/*.parquet",))


def _open(path: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: not a readable Parquet file: {error}. Copy it again or take it out of the paths.") from error


def _group_ends(path: str, column: str) -> list[int]:
    """Rows of the file up to the end of each row group."""
    with _open(path) as file:
        check_column(file.schema_arrow, path, column)
        return list(accumulate(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)))


def _read_group(path: str, group: int, column: str) -> Any:
    import pyarrow

    with _open(path) as file:
        try:
            return file.read_row_group(group, columns=[column]).column(0)
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{path}: row group {group} is damaged: {error}. Copy the file again.") from error
