"""Text in columns of Arrow tables, for the sources that read them."""

from typing import Any

from mlt.data.sources import BadRecord
from mlt.errors import UserError

ARROW = ("pyarrow", "reading Parquet and Arrow files")
"""What to pass to `require_package`."""


def check_column(schema: Any, path: str, column: str) -> None:
    """Raises UserError if a file's schema has no such column or it is not text."""
    import pyarrow

    if column not in schema.names:
        present = ", ".join(repr(name) for name in schema.names) or "none"
        raise UserError(
            f"{path}: no column {column!r} (columns present: {present}). Set column= of the source to the one with the text."
        )
    kind = schema.field(column).type
    inner = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    of_text = ("is_string", "is_large_string", "is_string_view", "is_binary", "is_large_binary", "is_binary_view")
    if not any(getattr(pyarrow.types, name)(inner) for name in of_text):
        raise UserError(f"{path}: column {column!r} holds {kind}, not text. Set column= of the source to one that does.")


def text_of(values: Any, row: int, name: str, column: str) -> str:
    """The text in `row` of a column's values; `name` is the document's. Raises BadRecord if it is null or not UTF-8."""
    try:
        value = values[row].as_py()
        value = value.decode("utf-8") if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise BadRecord(
            f"{name}: column {column!r} is not UTF-8 at byte {error.start} ({error.reason}). Repair or remove the row."
        ) from error
    if value is None:
        raise BadRecord(f"{name}: column {column!r} is null. Remove the row.")
    return value
