"""Read checkpoints back: strict about the tree, on any mesh, verified to the bit, one array at a time."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from mlt.checkpoint.arrays import altered
from mlt.checkpoint.digest import text_of
from mlt.checkpoint.durable import Durable, remembered
from mlt.checkpoint.layout import (
    LOGGER,
    CheckpointError,
    StepFiles,
    Unreadable,
    committed_steps,
    damaged_steps,
    read_record,
    require_step,
    step_files,
    step_path,
    unfinished,
)
from mlt.checkpoint.leaves import Leaf, difference, flatten, is_key, table
from mlt.checkpoint.place import place_arrays, stored_form
from mlt.errors import UserError

CASTS = ("float32", "bfloat16", "float16")
"""Types that an array may be restored in."""


class Restored(NamedTuple):
    """What a checkpoint gives back.

    Attributes:
      step: the step it was saved at.
      state: the tree of arrays, with the target's structure, types and shardings.
      data: the position in the data, as given to `save`.
      meta: what the run recorded, as given to `save`.
      source: the path or URL it was read from.
    """

    step: int
    state: Any
    data: dict[str, Any]
    meta: dict[str, Any]
    source: str = ""


def restore(
    directory: str | Path,
    target: Any,
    *,
    step: int | None = None,
    durable: Durable | None = None,
    subtree: str | None = None,
    dtypes: Mapping[str, str] | None = None,
) -> Restored:
    """Restore one step, the newest committed one by default. Writes nothing; safe beside a running training.

    Where the directory has lost the step (or every step), the durable copy is read, if there is such a place.

    Args:
      directory: the directory that holds the steps.
      target: tree of jax.ShapeDtypeStruct with shardings (or of arrays); it decides structure, mesh and placement.
      step: the step to read.
      durable: the durable place; None takes the one that the directory names, if it does.
      subtree: restore only the part of the saved state under this path, e.g. "model"; `target` is then the tree of
        that part, and nothing else is read.
      dtypes: path -> float32, bfloat16 or float16, e.g. {"optimizer": "bfloat16"}: floating arrays at and below that
        path come back in this type instead of the saved one, rounded after their digests are verified. The longest path
        that fits an array decides; "" fits all. Without it types are never changed.

    Raises:
      UserError: the saved tree differs from the target in a path, a shape or a type; the message lists how.
      CheckpointError: there is no such step, or what is on the disk is damaged.
    """
    directory = Path(directory)
    return _restore_step(_find(directory, step, durable), target, subtree, dtypes or {})


def restore_latest(
    directory: str | Path,
    target: Any,
    *,
    durable: Durable | None = None,
    subtree: str | None = None,
    dtypes: Mapping[str, str] | None = None,
    on_damage: Callable[[StepFiles], None] | None = None,
) -> Restored | None:
    """Restore the newest step of either level that can be read, going back over damaged ones with a warning for each.

    A tree that does not fit the target is not damage: it raises, and no older step is tried.

    Args:
      directory: the directory that holds the steps.
      target: as for `restore`.
      durable: the durable place; a step that is at both levels is read from the directory.
      subtree: as for `restore`.
      dtypes: as for `restore`.
      on_damage: called with every damaged step once all processes agree on it.

    Returns:
      None where no step was ever committed.

    Raises:
      UserError: the saved tree differs from the target.
      CheckpointError: there are committed steps and every one of them is damaged, or there is no local step and the
        durable place cannot be read.
      Unreadable: the newest step cannot be read for now; going on from an older one would lose steps.
    """
    directory = Path(directory)
    tried: list[tuple[int, int]] = []
    for path in unfinished(directory):
        LOGGER.warning("ignoring unfinished checkpoint %s: it is being written, or its writer died", path)
    far = _durable_steps(durable, needed=not committed_steps(directory))
    while True:
        # The local copy comes first among equals; -1 stands for no step at all.
        left = {(step, 1) for step in committed_steps(directory)} | {(step, 0) for step in far}
        step, local = _from_first_process(max(left - set(tried), default=(-1, 1)))
        if step < 0:
            break
        files = step_files(step_path(directory, step)) if local or durable is None else durable.files(step)
        try:
            return _restore_step(files, target, subtree, dtypes or {})
        except CheckpointError as error:
            if not _everywhere(not isinstance(error, Unreadable)):
                raise
            LOGGER.warning("%s", error)
        tried.append((step, local))
        if on_damage is not None:
            on_damage(files)
    if tried:
        also = f" and {durable.url}" if durable is not None else ""
        steps = ", ".join(str(step) for step in dict.fromkeys(step for step, _ in tried))
        aside = "were set aside and not deleted" if on_damage is not None else "are left as they are"
        again = "; the same command once more begins again from step 0" if on_damage is not None else ""
        raise CheckpointError(
            f"none of the checkpoints in {directory}{also} can be read: steps {steps} are damaged (see the warnings above), and "
            f"{aside}. Put a copy of one of them back under its number{again}"
        )
    return None


def _restore_step(files: StepFiles, target: Any, subtree: str | None, dtypes: Mapping[str, str]) -> Restored:
    """Read on every process first, then verify together: a process that fails alone must not leave the others waiting."""
    prefix = f"{subtree}/" if subtree else ""
    wanted = {name: _retyped(name, leaf, dtypes) for name, leaf in flatten(target, prefix=prefix).items()}
    record, saved, placed, problem = None, {}, None, None
    try:
        record = read_record(files)
        saved = {name: leaf for name, leaf in record.leaves.items() if name.startswith(prefix)}
        _check_fit(files, saved, wanted, dtypes)
        placed = place_arrays(files, saved, {name: stored_form(leaf) for name, leaf in wanted.items()})
    except UserError as error:
        problem = error
    if not _everywhere(problem is None) or record is None or placed is None:
        raise problem or CheckpointError(f"checkpoint {files.name} is damaged: another process cannot read its part")
    found = _summed([placed.digests[name] for name in wanted])
    wrong = [name for name, digest in zip(wanted, found, strict=True) if text_of(digest) != saved[name].digest]
    if wrong:
        raise altered(files, wrong)
    leaves = [
        jax.random.wrap_key_data(placed.arrays[name], impl=saved[name].key_impl) if is_key(leaf) else placed.arrays[name]
        for name, leaf in wanted.items()
    ]
    state = jax.tree.unflatten(jax.tree.structure(target), leaves)
    return Restored(files.step, state, record.data, record.meta, files.name)


def _retyped(name: str, leaf: Any, dtypes: Mapping[str, str]) -> Any:
    """The target of a leaf with the type that `dtypes` asks for."""
    asked = _asked_type(name, dtypes)
    if asked is None or is_key(leaf) or not jax.numpy.issubdtype(leaf.dtype, np.floating):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, jax.numpy.dtype(asked), sharding=leaf.sharding)


def _asked_type(name: str, dtypes: Mapping[str, str]) -> str | None:
    fitting = [path for path in dtypes if path == "" or name == path or name.startswith(f"{path}/")]
    if not fitting:
        return None
    asked = dtypes[max(fitting, key=len)]
    if asked not in CASTS:
        raise UserError(f"cannot restore {max(fitting, key=len) or 'a state'} as {asked!r}; choose one of {', '.join(CASTS)}")
    return asked


def _check_fit(files: StepFiles, saved: dict[str, Leaf], wanted: dict[str, Any], dtypes: Mapping[str, str]) -> None:
    rows = table(wanted)
    for name, row in rows.items():
        if _asked_type(name, dtypes) == row.dtype and name in saved and saved[name].dtype in (*CASTS, "float64"):
            rows[name] = row._replace(dtype=saved[name].dtype)
    lines = difference(saved, rows)
    if lines:
        raise UserError(
            f"checkpoint {files.name} does not fit this model:\n{lines}\nA state is restored whole or not at all. Use the "
            "config that the run was started with (config.yaml in its directory), or a new run directory."
        )


def _find(directory: Path, step: int | None, place: Durable | None) -> StepFiles:
    """The local step, or its durable copy where the directory has none."""
    near = committed_steps(directory)
    newest = near[-1] if near else -1
    durable = None
    if (step is None and not near) or (step is not None and step not in near):
        durable = place or remembered(directory)
        far = _durable_steps(durable, needed=False)
        newest = far[-1] if far else -1
        if step is not None and step not in far:
            durable = None
    chosen, far_away = _from_first_process((newest if step is None else step, int(durable is not None)))
    if chosen < 0:
        aside = ", ".join(path.name for path in damaged_steps(directory))
        early = "has the run saved one yet? (checkpoint.every_steps in its config)"
        why = f"these were damaged and set aside: {aside}" if aside else early
        raise CheckpointError(f"there is no committed checkpoint in {directory}; {why}")
    if far_away:
        durable = durable or place or remembered(directory)
        if durable is not None:
            LOGGER.warning("step %d is not in %s; reading its durable copy in %s", chosen, directory, durable.url)
            return durable.files(chosen)
    return step_files(require_step(directory, chosen))


def _durable_steps(durable: Durable | None, *, needed: bool) -> list[int]:
    """The durable steps; none, with a warning, where the place cannot be read and something else can be."""
    if durable is None:
        return []
    try:
        return durable.steps()
    except OSError as error:
        message = f"cannot read the durable checkpoints in {durable.url}: {error.strerror or error}"
        if needed:
            raise CheckpointError(
                f"{message}; there is no local checkpoint either, so the run would start again from nothing. Make the place "
                "readable; for a run that never saved, correct or drop checkpoint.durable_path"
            ) from error
        LOGGER.warning("%s; using the local ones alone", message)
        return []


def _from_first_process(values: tuple[int, int]) -> tuple[int, int]:
    """Let every process act on what the first one sees, however the shared disk lags."""
    if jax.process_count() == 1:
        return values
    first, second = multihost_utils.broadcast_one_to_all(np.array(values, np.int32))
    return int(first), int(second)


def _everywhere(fine: bool) -> bool:
    """Tell whether all processes are fine."""
    if jax.process_count() == 1:
        return fine
    return bool(np.all(multihost_utils.process_allgather(np.bool_(fine))))


def _summed(parts: list[int]) -> list[int]:
    """The parts' digests of all processes, added up."""
    if jax.process_count() == 1 or not parts:
        return parts
    gathered = multihost_utils.process_allgather(np.array([part & 0xFFFFFFFF for part in parts], np.uint32))
    return [int(total) for total in np.sum(np.asarray(gathered), axis=0, dtype=np.uint32)]
