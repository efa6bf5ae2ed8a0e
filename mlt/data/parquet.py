"""Parquet files as documents: one row, one document."""

from bisect import bisect_right
from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field

from mlt.config.problems import Problem
from mlt.data.arrow_text import ARROW, check_columns, readers_of
from mlt.data.sources import Documents, Positions, Source, find_files, package_problem, require_files, require_package
from mlt.errors import UserError

_SUFFIXES = (".parquet", ".pq")


class Parquet(Source):
    """Parquet files: each row is a document, one column of which is the text. Needs the package pyarrow.

    One row group is in memory at a time, and of it the columns that are named here alone.

    Attributes:
        paths: files, folders (every .parquet and .pq file below them) or patterns such as `data/*.parquet`, relative to the
            directory the command runs in.
        column: name of the column that holds the text.
        cluster_column: name of the column that holds the document's cluster, for `data.clusters=RecordClusters(...)`.
    """

    cluster_setting: ClassVar[str | None] = "cluster_column"

    paths: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
    column: Annotated[str, Field(min_length=1)] = "text"
    cluster_column: Annotated[str, Field(min_length=1)] | None = None

    def documents(self) -> Documents:
        """The rows of all files in order; names are `file:row`, rows from 0.

        Raises UserError if a file is missing, is not Parquet or lacks a column; reading a document raises BadRecord if it
        is null or not UTF-8.
        """
        require_package(*ARROW)
        files = require_files(self.paths, "Parquet", _SUFFIXES)
        wanted = (self.column, self.cluster_column)
        groups = [_group_ends(path, *wanted) for path in files]
        names = Positions(files, [ends[-1] if ends else 0 for ends in groups])
        group_of = lru_cache(maxsize=1)(lambda file, group: _read_group(files[file], group, *wanted))

        def place(document: int) -> tuple[list[Any], int]:
            file, row = names.place(document)
            group = bisect_right(groups[file], row)
            return group_of(file, group), row - (groups[file][group - 1] if group else 0)

        read, clusters = readers_of(place, names, *wanted)
        return Documents(origin=f"Parquet files {', '.join(self.paths)}", names=names, read=read, clusters=clusters)

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


def _group_ends(path: str, column: str, cluster_column: str | None) -> list[int]:
    """Rows of the file up to the end of each row group."""
    with _open(path) as file:
        check_columns(file.schema_arrow, path, column, cluster_column)
        return list(accumulate(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)))


def _read_group(path: str, group: int, column: str, cluster_column: str | None) -> list[Any]:
    """The columns, text first."""
    import pyarrow

    with _open(path) as file:
        columns = check_columns(file.schema_arrow, path, column, cluster_column)
        try:
            held = file.read_row_group(group, columns=columns)
            return [held.column(name) for name in columns]
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{path}: row group {group} is damaged: {error}. Copy the file again.") from error
