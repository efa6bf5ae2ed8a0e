"""Text and clusters in columns of Arrow tables, for the sources that read them."""

from collections.abc import Callable, Sequence
from typing import Any

from mlt.data.sources import BadRecord, ClusterField
from mlt.errors import UserError

ARROW = ("pyarrow", "reading Parquet and Arrow files")
"""What to pass to `require_package`."""


def check_columns(schema: Any, path: str, column: str, cluster_column: str | None) -> list[str]:
    """The columns to read: that with the text, and that with the clusters where one is named.

    Raises UserError if a file's schema has no such column, the first is not text, or the second neither whole numbers nor
    lists of them.
    """
    import pyarrow

    names = ("is_string", "is_large_string", "is_string_view", "is_binary", "is_large_binary", "is_binary_view")
    of_text = lambda kind: any(getattr(pyarrow.types, name)(kind) for name in names)  # noqa: E731
    _check(schema, path, column, "column", "the one with the text", "not text", of_text)
    if cluster_column is None:
        return [column]

    def of_ids(kind: Any) -> bool:
        lists = (pyarrow.types.is_list, pyarrow.types.is_large_list, pyarrow.types.is_fixed_size_list)
        return pyarrow.types.is_integer(kind.value_type if any(is_list(kind) for is_list in lists) else kind)

    rule = "neither whole numbers nor lists of them"
    _check(schema, path, cluster_column, "cluster_column", "the one with the clusters", rule, of_ids)
    return [column, cluster_column]


def _check(schema: Any, path: str, column: str, setting: str, what: str, rule: str, suits: Callable[[Any], bool]) -> None:
    import pyarrow

    if column not in schema.names:
        present = ", ".join(repr(name) for name in schema.names) or "none"
        raise UserError(f"{path}: no column {column!r} (columns present: {present}). Set {setting}= of the source to {what}.")
    kind = schema.field(column).type
    if not suits(kind.value_type if pyarrow.types.is_dictionary(kind) else kind):
        raise UserError(f"{path}: column {column!r} holds {kind}, {rule}. Set {setting}= of the source to one that does.")


def readers_of(
    place: Callable[[int], tuple[list[Any], int]], names: Sequence[str], column: str, cluster_column: str | None
) -> tuple[Callable[[int], str], ClusterField | None]:
    """What `Documents` takes: `read` and `clusters`.

    Args:
        place: index of a document -> values of the columns of `check_columns`, and its row in them.
        names: of the documents.
    """

    def read(document: int) -> str:
        columns, row = place(document)
        return text_of(columns[0], row, names[document], column)

    def both(document: int) -> tuple[str, Any]:
        columns, row = place(document)
        return text_of(columns[0], row, names[document], column), columns[1][row].as_py()

    return read, None if cluster_column is None else ClusterField(f"column {cluster_column!r}", both)


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
