"""Where a checkpoint keeps what: directories, the small JSON files, and what counts as committed.

    <run>/checkpoints/<step>/state/            the arrays (Orbax, OCDBT)
    <run>/checkpoints/<step>/data/metadata     position in the data, JSON
    <run>/checkpoints/<step>/meta/metadata     what the run recorded, the table of leaves and check sums, JSON
    <run>/checkpoints/durable                  where the durable copies go, see `mlt.checkpoint.durable`

A save is written beside its place and renamed when it is complete, so a step directory with a commit time is whole.
Everything else is left over from a writer that died.
"""

import json
import logging
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlt.checkpoint.leaves import Leaf, from_json, to_json
from mlt.checkpoint.storage import is_passing, reason_of
from mlt.errors import UserError

LOGGER = logging.getLogger("mlt.checkpoint")
_FORMAT = 1
_COMMIT_FILE = "_CHECKPOINT_METADATA"
_JSON_FILE = "metadata"
_UNFINISHED_MARK = ".orbax-checkpoint-tmp"
_DELETED_MARK = ".deleted"


class CheckpointError(UserError):
    """A checkpoint could not be written, or what is on the disk cannot be read back."""


class Unreadable(CheckpointError):
    """What is there cannot be read for now: no rights, no network. It is no damage, and nothing is set aside for it."""


class StepFiles(NamedTuple):
    """Where the files of one step are read from, at either level.

    Attributes:
      step: its number.
      name: path or URL, for messages.
      read: contents of a file by its name below the step; raises OSError.
      driver: TensorStore's specification of the key-value store below a name that ends in a slash.
    """

    step: int
    name: str
    read: Callable[[str], bytes]
    driver: Callable[[str], dict[str, Any]]


class Record(NamedTuple):
    """The JSON side of a checkpoint: the caller's `meta` and `data`, and the table of the state's leaves."""

    meta: dict[str, Any]
    data: dict[str, Any]
    leaves: dict[str, Leaf]


def step_path(directory: Path, step: int) -> Path:
    """Give the directory of one step."""
    return directory / str(step)


def step_files(path: Path, step: int | None = None) -> StepFiles:
    """Give the files of a step directory on this machine; its name is the step unless told."""
    path = path.absolute()
    return StepFiles(
        int(path.name) if step is None else step,
        str(path),
        lambda name: (path / name).read_bytes(),
        lambda name: {"driver": "file", "path": f"{path / name}/"},
    )


def committed_steps(directory: str | Path) -> list[int]:
    """List the committed steps of a checkpoint directory in ascending order; empty where there is no directory.

    Raises:
      CheckpointError: the directory exists but cannot be listed.
    """
    return [int(path.name) for path in _step_directories(Path(directory)) if _is_committed(path)]


def unfinished(directory: str | Path) -> list[Path]:
    """List what interrupted saves left behind: step directories without commit time, and temporary ones."""
    directory = Path(directory)
    halves = [path for path in _step_directories(directory) if not _is_committed(path)]
    return halves + [path for path in _list(directory) if path.name.endswith(_UNFINISHED_MARK)]


def damaged_steps(directory: str | Path) -> list[Path]:
    """List the step directories that were set aside because they are damaged."""
    return [path for path in _list(Path(directory)) if ".damaged" in path.name]


def set_aside(path: Path) -> Path:
    """Rename a damaged step directory so that its step can be saved again; nothing is deleted."""
    target, count = path.with_name(f"{path.name}.damaged"), 1
    while target.exists():
        target, count = path.with_name(f"{path.name}.damaged-{count}"), count + 1
    path.rename(target)
    return target


def delete_step(path: Path) -> None:
    """Delete a step directory. It is renamed first: one that a kill leaves half deleted does not count as a step."""
    target = path.with_name(path.name + _DELETED_MARK)
    shutil.rmtree(target, ignore_errors=True)
    path.rename(target)
    shutil.rmtree(target, ignore_errors=True)


def clear_leftovers(directory: Path) -> None:
    """Delete what a writer that died left of temporary and half deleted directories."""
    for path in _list(directory):
        if path.name.endswith((_UNFINISHED_MARK, _DELETED_MARK)) and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def encode(meta: Mapping[str, Any], data: Mapping[str, Any], leaves: Mapping[str, Leaf]) -> tuple[dict, dict]:
    """Build the contents of the two JSON items, `meta` and `data`.

    Both are copies, so the caller may go on changing its own dictionaries while they are written.

    Raises:
      TypeError: something in them is not JSON.
    """
    data_copy = json.loads(json.dumps(data))
    body = json.loads(json.dumps({"format": _FORMAT, "meta": meta, "leaves": to_json(leaves)}))
    body["data_crc32"] = _crc32(data_copy)
    return {**body, "crc32": _crc32(body)}, data_copy


def read_record(place: Path | StepFiles) -> Record:
    """Read and verify the JSON items of a committed step, without touching an array.

    Args:
      place: a step directory, or the files of a step at either level.

    Raises:
      CheckpointError: a file is missing, unreadable or altered.
      UserError: a newer version of mlt wrote it.
    """
    files = place if isinstance(place, StepFiles) else step_files(place)
    body, data = _read_json(files, f"meta/{_JSON_FILE}"), _read_json(files, f"data/{_JSON_FILE}")
    written = body.get("format")
    if isinstance(written, int) and written > _FORMAT:
        raise UserError(  # no damage, and so no reason to set it aside
            f"checkpoint {files.name} has format {written}, and this version of mlt reads format {_FORMAT}: it was written by a "
            "newer one; go on with that, or in a new run directory"
        )
    if written != _FORMAT:
        raise damaged(files.name, f"meta/{_JSON_FILE} names the format {written!r}, not {_FORMAT}")
    for name, content, expected in (
        ("meta", {key: body[key] for key in body if key != "crc32"}, body.get("crc32")),
        ("data", data, body.get("data_crc32")),
    ):
        if _crc32(content) != expected:
            raise damaged(files.name, f"the contents of {name}/{_JSON_FILE} were altered")
    return Record(body["meta"], data, from_json(body["leaves"]))


def damaged(name: str, reason: str) -> CheckpointError:
    """Make the error of a step that was committed and cannot be read back."""
    return CheckpointError(
        f"checkpoint {name} is damaged: {reason}. A resume takes the newest whole step instead; `mlt checkpoint verify` "
        "on its directory shows which those are"
    )


def unreadable(name: str, reason: str) -> Unreadable:
    """Make the error of a step that cannot be read for now."""
    return Unreadable(
        f"checkpoint {name} cannot be read: {reason}. This is no damage, so no older step is taken: make it readable and give "
        "the same command again, or move the step out of its directory"
    )


def read_meta(directory: str | Path, step: int) -> dict[str, Any]:
    """Read what the run recorded with a step, without its arrays (milliseconds, no Orbax).

    Raises:
      CheckpointError: the step is not committed, or its files are damaged.
    """
    return read_record(require_step(Path(directory), step)).meta


def read_leaves(directory: str | Path, step: int) -> dict[str, Leaf]:
    """Read the table of a step's arrays: path -> shape, type, digest.

    Raises:
      CheckpointError: the step is not committed, or its files are damaged.
    """
    return read_record(require_step(Path(directory), step)).leaves


def require_step(directory: Path, step: int) -> Path:
    """Give the directory of a committed step.

    Raises:
      CheckpointError: there is no such step; the message lists those there are.
    """
    path = step_path(directory, step)
    if not _is_committed(path):
        have = ", ".join(map(str, committed_steps(directory))) or "none"
        raise CheckpointError(f"there is no checkpoint of step {step} in {directory}; committed steps: {have}")
    return path


def _list(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(
            f"cannot list the checkpoints in {directory}: {error.strerror}; make it a directory that can be read, or move it away"
        ) from error


def _step_directories(directory: Path) -> list[Path]:
    paths = [path for path in _list(directory) if path.name.isascii() and path.name.isdigit() and path.is_dir()]
    return sorted(paths, key=lambda path: int(path.name))


def _is_committed(path: Path) -> bool:
    try:
        return bool(json.loads((path / _COMMIT_FILE).read_bytes())["commit_timestamp_nsecs"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _read_json(files: StepFiles, name: str) -> dict[str, Any]:
    try:
        content = json.loads(files.read(name))
    except (OSError, ValueError) as error:
        if is_passing(error):
            raise unreadable(files.name, f"{name}: {reason_of(error)}") from error
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise damaged(files.name, f"cannot read {name}: {reason}") from error
    if not isinstance(content, dict):
        raise damaged(files.name, f"{name} holds no mapping")
    return content


def _crc32(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
