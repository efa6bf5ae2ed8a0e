"""ArrayRecord files as documents: one record, one document. The format of Grain's global shuffle."""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from mlt.config.problems import Problem
from mlt.data.json_lines import readers_of, record_of
from mlt.data.sources import (
    BadRecord,
    ClusterField,
    Documents,
    Positions,
    Source,
    decode_utf8,
    find_files,
    package_problem,
    require_files,
    require_package,
)
from mlt.errors import UserError

_SUFFIXES = (".array_record", ".arrayrecord")
_PACKAGE = ("array_record", "reading ArrayRecord files")


class ArrayRecords(Source):
    """ArrayRecord files: each record is a document. Needs the package array_record.

    Attributes:
        paths: files, folders (every .array_record file below them) or patterns, relative to the directory the command runs
            in.
        record: what a record is: UTF-8 "text", a "json" object, or a tf.train.Example ("example").
        field: name of the text in a JSON object or Example.
        cluster_field: name there of the document's cluster, for `data.clusters=RecordClusters(...)`.
    """

    cluster_setting: ClassVar[str | None] = "cluster_field"

    paths: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
    record: Literal["text", "json", "example"] = "text"
    field: Annotated[str, Field(min_length=1)] = "text"
    cluster_field: Annotated[str, Field(min_length=1)] | None = None

    def problems(self) -> Iterable[Problem]:
        if self.record == "text" and self.cluster_field is not None:
            ways_out = "set record to 'json' or 'example', or leave it None"
            yield Problem("cluster_field", self.cluster_field, "names a field, and records that are text have none", ways_out)

    def documents(self) -> Documents:
        """The records of all files in order; names are `file:record`, records from 0.

        Raises UserError if a file is missing or no ArrayRecord file; reading a document raises BadRecord if it is damaged
        or not what `record` says.
        """
        require_package(*_PACKAGE)
        files = require_files(self.paths, "ArrayRecords", _SUFFIXES)
        names = Positions(files, [_open(path).num_records() for path in files])
        reader_of = lru_cache(maxsize=1)(_open)

        def data(document: int) -> bytes:
            file, record = names.place(document)
            try:
                return reader_of(files[file]).read([record])[0]
            except RuntimeError as error:
                raise BadRecord(f"{names[document]}: damaged: {error}. Copy the file again or do without the record.") from error

        read, clusters = self._readers(data, names)
        return Documents(origin=f"ArrayRecord files {', '.join(self.paths)}", names=names, read=read, clusters=clusters)

    def file_problems(self) -> Iterable[Problem]:
        missing = package_problem(*_PACKAGE)
        return [*find_files(self.paths, _SUFFIXES)[1], *([missing] if missing else [])]

    @classmethod
    def example(cls) -> Self:
        return cls(paths=("data/*.array_record",))

    def _readers(self, data: Callable[[int], bytes], names: Sequence[str]) -> tuple[Callable[[int], str], ClusterField | None]:
        if self.record == "text":
            return lambda document: decode_utf8(data(document), names[document]), None
        if self.record == "json":
            record = lambda document: record_of(data(document), self.field, names[document])  # noqa: E731
            return readers_of(record, self.field, self.cluster_field)
        kind, name = example_class(), self.cluster_field
        example = lambda document: _Example(kind, data(document), names[document])  # noqa: E731

        def both(document: int) -> tuple[str, Any]:
            found = example(document)
            return found.text(self.field), found.numbers(str(name))

        clusters = None if name is None else ClusterField(f"feature {name!r}", both)
        return lambda document: example(document).text(self.field), clusters


def _open(path: str) -> Any:
    from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

    try:
        reader = array_record_module.ArrayRecordReader(path)
        usable = reader.ok()
    except RuntimeError as error:
        raise UserError(
            f"{path}: not a readable ArrayRecord file: {error}. Copy it again or take it out of the paths."
        ) from error
    if not usable:
        raise UserError(f"{path}: not a readable ArrayRecord file. Copy it again or take it out of the paths.")
    return reader


class _Example:
    """The features of a tf.train.Example by name; BadRecord, with the name of the document, where they are not as wanted."""

    def __init__(self, kind: Any, data: bytes, document: str):
        from google.protobuf.message import DecodeError

        self._document = document
        try:
            found = kind.FromString(data)
        except DecodeError as error:
            raise BadRecord(
                f"{document}: not a tf.train.Example: {error}. Set record= of the source to what the records are."
            ) from error
        self._features = {entry.key: entry.value for entry in found.features.feature}

    def text(self, name: str) -> str:
        values = self._feature(name, "field", "the text").bytes_list.value
        if len(values) != 1:
            raise BadRecord(f"{self._document}: feature {name!r} holds {len(values)} byte strings, not one. Repair the record.")
        return decode_utf8(values[0], self._document)

    def numbers(self, name: str) -> int | list[int] | None:
        """The whole numbers of a feature: one alone as a number, None where there are none."""
        values = list(self._feature(name, "cluster_field", "the cluster").int64_list.value)
        return values if len(values) > 1 else next(iter(values), None)

    def _feature(self, name: str, setting: str, what: str) -> Any:
        if name not in self._features:
            present = ", ".join(map(repr, self._features)) or "none"
            where = f"{self._document}: no feature {name!r} (present: {present})"
            raise BadRecord(f"{where}. Set {setting}= of the source to the one with {what}.")
        return self._features[name]


@lru_cache(maxsize=1)
def example_class() -> Any:
    """The message tf.train.Example, as far as text and whole numbers go: Example.features.feature[name].bytes_list.value."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="mlt_example.proto", package="mlt_example", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto

    def message(name: str, *fields: tuple[str, int, int, str | None, bool]) -> None:
        made = file.message_type.add(name=name)
        for field, number, kind, of, repeated in fields:
            label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            made.field.add(name=field, number=number, type=kind, label=label, type_name=of and f".mlt_example.{of}")

    message("BytesList", ("value", 1, kinds.TYPE_BYTES, None, True))
    message("Int64List", ("value", 1, kinds.TYPE_INT64, None, True))
    lists = (("bytes_list", 1, kinds.TYPE_MESSAGE, "BytesList", False), ("int64_list", 3, kinds.TYPE_MESSAGE, "Int64List", False))
    message("Feature", *lists)
    message("Entry", ("key", 1, kinds.TYPE_STRING, None, False), ("value", 2, kinds.TYPE_MESSAGE, "Feature", False))
    message("Features", ("feature", 1, kinds.TYPE_MESSAGE, "Entry", True))
    message("Example", ("features", 1, kinds.TYPE_MESSAGE, "Features", False))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("mlt_example.Example"))
