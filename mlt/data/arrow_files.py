"""Arrow files as documents, and the folders that Hugging Face `datasets` saves: one row, one document."""

import json
import os
from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field

from mlt.config.problems import ConfigError, Problem
from mlt.data.arrow_text import ARROW, check_columns, readers_of
from mlt.data.sources import Documents, Positions, Source, find_files, package_problem, require_package
from mlt.errors import UserError

_SUFFIXES = (".arrow",)
_STATE, _SPLITS = "state.json", "dataset_dict.json"  # of a saved dataset, and of a dictionary of them


class ArrowFiles(Source):
    """Arrow IPC files, as streams or files: each row is a document, one column of which is the text. Needs pyarrow.

    The files are mapped, not read; only batches with compressed buffers take memory, decompressed.

    Attributes:
        paths: files, folders written by `Dataset.save_to_disk`, other folders (every .arrow file below them) or patterns,
            relative to the directory the command runs in.
        column: name of the column that holds the text.
        split: which split of a folder that was written by `DatasetDict.save_to_disk`.
        cluster_column: name of the column that holds the document's cluster, for `data.clusters=RecordClusters(...)`.
    """

    cluster_setting: ClassVar[str | None] = "cluster_column"

    paths: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
    column: Annotated[str, Field(min_length=1)] = "text"
    split: Annotated[str, Field(min_length=1)] | None = None
    cluster_column: Annotated[str, Field(min_length=1)] | None = None

    def documents(self) -> Documents:
        """The rows of all files in order; names are `file:row`, rows from 0.

        Raises UserError if a file is missing, is no Arrow file or lacks a column; reading a document raises BadRecord if
        it is null or not UTF-8.
        """
        require_package(*ARROW)
        files, problems = self._files()
        if problems:
            raise ConfigError(problems, "ArrowFiles")
        wanted = (self.column, self.cluster_column)
        batches = [_batches(path, *wanted) for path in files]
        ends = [list(accumulate(len(batch[0]) for batch in parts)) for parts in batches]
        names = Positions(files, [end[-1] if end else 0 for end in ends])

        def place(document: int) -> tuple[list[Any], int]:
            file, row = names.place(document)
            part = bisect_right(ends[file], row)
            return batches[file][part], row - (ends[file][part - 1] if part else 0)

        read, clusters = readers_of(place, names, *wanted)
        return Documents(origin=f"Arrow files {', '.join(self.paths)}", names=names, read=read, clusters=clusters)

    def file_problems(self) -> Iterable[Problem]:
        missing = package_problem(*ARROW)
        return [*self._files()[1], *([missing] if missing else [])]

    @classmethod
    def example(cls) -> Self:
        return cls(paths=("data/saved",))

    def _files(self) -> tuple[list[str], list[Problem]]:
        files: dict[str, None] = {}
        problems: list[Problem] = []
        for number, entry in enumerate(self.paths):
            try:
                found = _saved_files(os.path.expanduser(entry), self.split)
            except _Unusable as error:
                problems.append(Problem(f"paths[{number}]", entry, *error.args))
                continue
            if found is None:
                found, missing = find_files([entry], _SUFFIXES)
                problems += [Problem(f"paths[{number}]", one.value, one.rule, one.ways_out) for one in missing]
            files.update(dict.fromkeys(found))
        return list(files), problems


class _Unusable(Exception):
    """Rule and ways out of a problem."""


def _saved_files(path: str, split: str | None) -> list[str] | None:
    """The files of a saved dataset in its order; None if `path` is no folder of one."""
    if os.path.isfile(os.path.join(path, _SPLITS)):
        splits = _read_json(os.path.join(path, _SPLITS)).get("splits", [])
        if split not in splits:
            given = "and split is not set" if split is None else f"and not {split!r}"
            raise _Unusable(f"is a folder of the splits {', '.join(splits)}, {given}", "set split to one of them")
        path = os.path.join(path, str(split))
    if not os.path.isfile(os.path.join(path, _STATE)):
        return None
    state = _read_json(os.path.join(path, _STATE))
    if state.get("_indices_data_files"):
        ways_out = "load it with datasets and save dataset.flatten_indices()"
        raise _Unusable("is a dataset saved with a separate order of its rows, which is not read here", ways_out)
    files = [os.path.join(path, file["filename"]) for file in state.get("_data_files", [])]
    gone = [file for file in files if not os.path.isfile(file)]
    if gone or not files:
        rule = f"{_STATE} names {gone[0]}, which does not exist" if gone else f"{_STATE} names no data file"
        raise _Unusable(rule, "copy the whole folder again")
    return files


def _read_json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except (OSError, ValueError) as error:
        raise _Unusable(f"{path} cannot be read: {error}", "copy the whole folder again") from error
    if not isinstance(value, dict):
        raise _Unusable(f"{path} holds no JSON object", "copy the whole folder again")
    return value


def _batches(path: str, column: str, cluster_column: str | None) -> list[list[Any]]:
    """The columns of each record batch, text first, mapped."""
    import pyarrow

    try:
        mapped = pyarrow.memory_map(path)
        whole = mapped.read(6) == b"ARROW1"
        mapped.seek(0)
        if whole:
            reader = pyarrow.ipc.open_file(mapped)
            parts = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            reader = parts = pyarrow.ipc.open_stream(mapped)
        columns = check_columns(reader.schema, path, column, cluster_column)
        return [[part.column(name) for name in columns] for part in parts]
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: not a readable Arrow file: {error}. Copy it again or take it out of the paths.") from error
