"""JSON Lines files as documents: one line, one object, one document."""

import json
from array import array
from collections.abc import Iterable, Sequence
from typing import Annotated, Self

from pydantic import Field

from mlt.config.problems import Problem
from mlt.data.sources import Documents, Source, decode_utf8, find_files, require_files
from mlt.errors import UserError


class JsonLines(Source):
    """JSON Lines files: each line is an object, one field of which is the text. Blank lines are skipped.

    Attributes:
        paths: files, folders (every file below them) or patterns such as `data/*.jsonl`, relative to the
            directory the command runs in.
        field: name of the field that holds the text.
    """

    paths: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
    field: Annotated[str, Field(min_length=1)] = "text"

    def documents(self) -> Documents:
        """The lines of all files in order. Raises UserError if a file is missing.

        Reading a document raises UserError with file and line number if the line is not what it should be.
        """
        index = _LineIndex(require_files(self.paths, "JsonLines"))

        def read(document: int) -> str:
            path, line, offset = index.place(document)
            with open(path, "rb") as file:
                file.seek(offset)
                return text_of_line(file.readline(), self.field, path=path, line=line, offset=offset)

        return Documents(origin=f"JSON lines {', '.join(self.paths)}", names=index, read=read)

    def file_problems(self) -> Iterable[Problem]:
        return find_files(self.paths)[1]

    @classmethod
    def example(cls) -> Self:
        return cls(paths=("data/*.jsonl",))


def text_of_line(data: bytes, field: str, *, path: str, line: int, offset: int) -> str:
    """The string `field` of the JSON object in `data`, a line of `path` that starts at byte `offset`.

    Raises UserError that says what is wrong with the line, and where.
    """
    place = f"{path}, line {line}"
    text = decode_utf8(data, place, first_byte=offset)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        cut = "" if data.endswith(b"\n") else " The file ends here without a line end: it looks truncated."
        raise UserError(
            f"{place}: not valid JSON: {error.msg} (column {error.colno} of {len(text.rstrip())}).{cut} "
            "Each line must be one whole JSON object: repair or remove the line."
        ) from error
    except RecursionError as error:
        raise UserError(f"{place}: the JSON is nested too deeply. Repair or remove the line.") from error
    if not isinstance(value, dict):
        raise UserError(
            f"{place}: holds a JSON {type(value).__name__}, not an object. "
            f'Each line must be an object such as {{"{field}": "..."}}.'
        )
    if field not in value:
        present = ", ".join(repr(name) for name in value) or "none"
        raise UserError(
            f"{place}: no field {field!r} (fields present: {present}). Set field= of the source to the one with the text."
        )
    content = value[field]
    if not isinstance(content, str):
        raise UserError(f"{place}: field {field!r} holds {json.dumps(content)[:40]}, not a string. Repair the line.")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place}: field {field!r} holds half a surrogate pair at character {error.start}, which is not "
            "text. Repair or remove the line."
        ) from error
    return content


class _LineIndex(Sequence[str]):
    """Where each document starts, and its name: file and line. A sequence of names."""

    def __init__(self, files: list[str]):
        self._files = files
        self._file, self._line, self._offset = array("l"), array("q"), array("q")
        for number, path in enumerate(files):
            offset = 0
            try:
                with open(path, "rb") as file:
                    for line, data in enumerate(file, start=1):
                        if data.strip():
                            self._file.append(number)
                            self._line.append(line)
                            self._offset.append(offset)
                        offset += len(data)
            except OSError as error:
                raise UserError(f"{path}: cannot be read: {error.strerror}. Check its permissions.") from error

    def __len__(self) -> int:
        return len(self._line)

    def __getitem__(self, document: int) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        path, line, _ = self.place(document)
        return f"{path}:{line}"

    def place(self, document: int) -> tuple[str, int, int]:
        """File, line number from 1, and byte offset of the line."""
        return self._files[self._file[document]], self._line[document], self._offset[document]
