"""ArrayRecord files as documents: one record, one document. The format of Grain's global shuffle."""

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from mlt.config.problems import Problem
from mlt.data.json_lines import text_of_object
from mlt.data.sources import (
    BadRecord,
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
    """

    paths: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
    record: Literal["text", "json", "example"] = "text"
    field: Annotated[str, Field(min_length=1)] = "text"

    def documents(self) -> Documents:
        """The records of all files in order; names are `file:record`, records from 0.

        Raises UserError if a file is missing or no ArrayRecord file; reading a document raises BadRecord if it is damaged
        or not what `record` says.
        """
        require_package(*_PACKAGE)
        files = require_files(self.paths, "ArrayRecords", _SUFFIXES)
        names = Positions(files, [_open(path).num_records() for path in files])
        reader_of = lru_cache(maxsize=1)(_open)
        decode = self._decoder()

        def read(document: int) -> str:
            file, record = names.place(document)
            try:
                data = reader_of(files[file]).read([record])[0]
            except RuntimeError as error:
                raise BadRecord(f"{names[document]}: damaged: {error}. Copy the file again or do without the record.") from error
            return decode(data, names[document])

        return Documents(origin=f"ArrayRecord files {', '.join(self.paths)}", names=names, read=read)

    def file_problems(self) -> Iterable[Problem]:
        missing = package_problem(*_PACKAGE)
        return [*find_files(self.paths, _SUFFIXES)[1], *([missing] if missing else [])]

    @classmethod
    def example(cls) -> Self:
        return cls(paths=("data/*.array_record",))

    def _decoder(self) -> Callable[[bytes, str], str]:
        if self.record == "text":
            return decode_utf8
        if self.record == "json":
            return lambda data, name: text_of_object(data, self.field, name)
        example = example_class()
        return lambda data, name: _text_of_example(example, data, self.field, name)


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


def _text_of_example(example: Any, data: bytes, field: str, name: str) -> str:
    from google.protobuf.message import DecodeError

    try:
        found = example.FromString(data)
    except DecodeError as error:
        raise BadRecord(f"{name}: not a tf.train.Example: {error}. Set record= of the source to what the records are.") from error
    features = {entry.key: entry.value.bytes_list.value for entry in found.features.feature}
    if field not in features:
        present = ", ".join(map(repr, features)) or "none"
        raise BadRecord(f"{name}: no feature {field!r} (present: {present}). Set field= of the source to the one with the text.")
    if len(features[field]) != 1:
        raise BadRecord(f"{name}: feature {field!r} holds {len(features[field])} byte strings, not one. Repair the record.")
    return decode_utf8(features[field][0], name)


@lru_cache(maxsize=1)
def example_class() -> Any:
    """The message tf.train.Example, as far as text goes: Example.features.feature[name].bytes_list.value."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="mlt_example.proto", package="mlt_example", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto

    def message(name: str, *fields: tuple[str, int, int, str | None, bool]) -> None:
        made = file.message_type.add(name=name)
        for field, number, kind, of, repeated in fields:
            label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            made.field.add(name=field, number=number, type=kind, label=label, type_name=of and f".mlt_example.{of}")

    message("BytesList", ("value", 1, kinds.TYPE_BYTES, None, True))
    message("Feature", ("bytes_list", 1, kinds.TYPE_MESSAGE, "BytesList", False))
    message("Entry", ("key", 1, kinds.TYPE_STRING, None, False), ("value", 2, kinds.TYPE_MESSAGE, "Feature", False))
    message("Features", ("feature", 1, kinds.TYPE_MESSAGE, "Entry", True))
    message("Example", ("features", 1, kinds.TYPE_MESSAGE, "Features", False))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("mlt_example.Example"))
