"""JSON Lines files as documents: one line, one object, one document; .gz and .zst are decompressed."""

import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field

from mlt.config.problems import Problem
from mlt.data.compressed import SUFFIXES, read_lines
from mlt.data.sources import BadRecord, ClusterField, Documents, Source, decode_utf8, find_files, require_files
from mlt.errors import UserError


class JsonLines(Source):
    """JSON Lines files: each line is an object, one field of which is the text. Blank lines are skipped.

    Attributes:
        paths: files, folders (every file below them) or patterns such as `data/*.jsonl`, relative to the
            directory the command runs in.
        field: name of the field that holds the text.
        cluster_field: name of the field that holds the document's cluster, for `data.clusters=RecordClusters(...)`.
    """

    cluster_setting: ClassVar[str | None] = "cluster_field"

    paths: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
    field: Annotated[str, Field(min_length=1)] = "text"
    cluster_field: Annotated[str, Field(min_length=1)] | None = None

    def documents(self) -> Documents:
        """The lines of all files in order. Raises UserError if a file is missing.

        Reading a document raises BadRecord with file and line number if the line is not what it should be.
        """
        index, forward = _LineIndex(require_files(self.paths, "JsonLines")), _Forward()

        def read_record(document: int) -> Record:
            path, line, offset = index.place(document)
            data = forward.line(path, line) if path.endswith(SUFFIXES) else _line_at(path, offset)
            return record_of_line(data, self.field, path=path, line=line, offset=offset)

        origin = f"JSON lines {', '.join(self.paths)}"
        read, clusters = readers_of(read_record, self.field, self.cluster_field)
        return Documents(origin=origin, names=index, read=read, clusters=clusters)

    def file_problems(self) -> Iterable[Problem]:
        return find_files(self.paths)[1]

    @classmethod
    def example(cls) -> Self:
        return cls(paths=("data/*.jsonl",))


@dataclass(frozen=True)
class Record:
    """A JSON object, and how messages name the place it was read from."""

    fields: Mapping[str, Any]
    place: str

    def value(self, field: str, setting: str, what: str) -> Any:
        """The value of a field. Raises BadRecord, which names the setting to change, where there is none."""
        if field not in self.fields:
            present = ", ".join(repr(name) for name in self.fields) or "none"
            raise BadRecord(
                f"{self.place}: no field {field!r} (fields present: {present}). Set {setting}= of the source to the one with "
                f"{what}."
            )
        return self.fields[field]

    def text(self, field: str) -> str:
        """The string in a field. Raises BadRecord where there is none."""
        content = self.value(field, "field", "the text")
        if not isinstance(content, str):
            raise BadRecord(f"{self.place}: field {field!r} holds {json.dumps(content)[:40]}, not a string. Repair it.")
        try:
            content.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRecord(
                f"{self.place}: field {field!r} holds half a surrogate pair at character {error.start}, which is not "
                "text. Repair or remove it."
            ) from error
        return content


def readers_of(
    read: Callable[[int], Record], field: str, cluster_field: str | None
) -> tuple[Callable[[int], str], ClusterField | None]:
    """What `Documents` takes, from a function that reads a document's record: `read` and `clusters`."""
    if cluster_field is None:
        return lambda document: read(document).text(field), None

    def both(document: int) -> tuple[str, Any]:
        record = read(document)
        return record.text(field), record.value(cluster_field, "cluster_field", "the cluster")

    return lambda document: read(document).text(field), ClusterField(f"field {cluster_field!r}", both)


def record_of_line(data: bytes, field: str, *, path: str, line: int, offset: int) -> Record:
    """The JSON object in `data`, a line of `path` that starts at byte `offset`; `field` is the one with the text.

    Raises BadRecord that says what is wrong with the line, and where.
    """
    cut = "" if data.endswith(b"\n") else " The file ends here without a line end: it looks truncated."
    advice = f"{cut} Each line must be one whole JSON object: repair or remove the line."
    return record_of(data, field, f"{path}, line {line}", first_byte=offset, advice=advice)


def record_of(
    data: bytes, field: str, place: str, *, first_byte: int = 0, advice: str = " Repair or remove the record."
) -> Record:
    """The JSON object in `data`, which starts at byte `first_byte` of what `place` names; `field` is the one with the text.

    Raises BadRecord that says what is wrong; `advice` ends it where the JSON is not valid.
    """
    text = decode_utf8(data, place, first_byte=first_byte)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"column {error.colno} of {len(text.rstrip())}"
        raise BadRecord(f"{place}: not valid JSON: {error.msg} ({where}).{advice}") from error
    except ValueError as error:  # a number of thousands of digits
        raise BadRecord(f"{place}: not valid JSON: {error}.{advice}") from error
    except RecursionError as error:
        raise BadRecord(f"{place}: the JSON is nested too deeply. Repair or remove it.") from error
    if not isinstance(value, dict):
        raise BadRecord(
            f'{place}: holds a JSON {type(value).__name__}, not an object. It must be an object such as {{"{field}": "..."}}.'
        )
    return Record(value, place)


class _LineIndex(Sequence[str]):
    """Where each document starts, and its name: file and line. A sequence of names."""

    def __init__(self, files: list[str]):
        self._files = files
        self._file, self._line, self._offset = array("l"), array("q"), array("q")
        for number, path in enumerate(files):
            offset = 0
            for line, data in enumerate(read_lines(path), start=1):
                if data.strip():
                    self._file.append(number)
                    self._line.append(line)
                    self._offset.append(offset)
                offset += len(data)

    def __len__(self) -> int:
        return len(self._line)

    def __getitem__(self, document: int) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        path, line, _ = self.place(document)
        return f"{path}:{line}"

    def place(self, document: int) -> tuple[str, int, int]:
        """File, line number from 1, and byte offset of the line."""
        return self._files[self._file[document]], self._line[document], self._offset[document]


def _line_at(path: str, offset: int) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.readline()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}. Check its permissions.") from error


class _Forward:
    """Lines of compressed files. It keeps its place, so that reading in order decompresses each file once."""

    def __init__(self) -> None:
        self._path, self._read = "", 0
        self._lines: Iterator[bytes] = iter(())

    def line(self, path: str, number: int) -> bytes:
        """Line `number`, from 1."""
        if path != self._path or number <= self._read:
            self._path, self._read, self._lines = path, 0, read_lines(path)
        for data in self._lines:
            self._read += 1
            if self._read == number:
                return data
        raise UserError(f"{path}: has only {self._read} lines now; it changed while it was read. Leave it as it is, start again.")
