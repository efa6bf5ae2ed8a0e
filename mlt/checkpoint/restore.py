"""Read checkpoints back: strict about the tree, on any mesh, verified to the bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from mlt.checkpoint.digest import digests
from mlt.checkpoint.layout import (
    LOGGER,
    CheckpointError,
    committed_steps,
    read_record,
    require_step,
    step_path,
    unfinished,
)
from mlt.checkpoint.leaves import Leaf, difference, flatten, is_key, table
from mlt.checkpoint.storage import ignore_abandoned_reads, reason_of, silence_orbax
from mlt.errors import UserError


class Restored(NamedTuple):
    """What a checkpoint gives back.

    Attributes:
      step: the step it was saved at.
      state: the tree of arrays, with the target's structure, types and shardings.
      data: the position in the data, as given to `save`.
      meta: what the run recorded, as given to `save`.
    """

    step: int
    state: Any
    data: dict[str, Any]
    meta: dict[str, Any]


def restore(directory: str | Path, target: Any, *, step: int | None = None, subtree: str | None = None) -> Restored:
    """Restore one step, the newest committed one by default. Writes nothing; safe beside a running training.

    Args:
      directory: the directory that holds the steps.
      target: tree of jax.ShapeDtypeStruct with shardings (or of arrays); it decides structure, mesh and placement.
      step: the step to read.
      subtree: restore only the part of the saved state under this path, e.g. "model"; `target` is then the tree of
        that part, and nothing else is read.

    Raises:
      UserError: the saved tree differs from the target in a path, a shape or a type; the message lists how.
      CheckpointError: there is no such step, or what is on the disk is damaged.
    """
    directory = Path(directory)
    if step is None:
        step = _newest(directory)
    return _restore_step(require_step(directory, step), step, target, subtree)


def restore_latest(
    directory: str | Path,
    target: Any,
    *,
    subtree: str | None = None,
    on_damage: Callable[[int], None] | None = None,
) -> Restored | None:
    """Restore the newest step that can be read, going back over damaged ones with a warning for each.

    A tree that does not fit the target is not damage: it raises, and no older step is tried.

    Args:
      directory: the directory that holds the steps.
      target: as for `restore`.
      subtree: as for `restore`.
      on_damage: called with every damaged step once all processes agree on it.

    Returns:
      None where no step was ever committed.

    Raises:
      UserError: the saved tree differs from the target.
      CheckpointError: there are committed steps and every one of them is damaged.
    """
    directory, tried = Path(directory), []
    for path in unfinished(directory):
        LOGGER.warning("ignoring unfinished checkpoint %s: it is being written, or its writer died", path)
    while True:
        left = [step for step in committed_steps(directory) if step not in tried]
        step = _from_first_process(left[-1] if left else -1)
        if step < 0:
            break
        try:
            return _restore_step(step_path(directory, step), step, target, subtree)
        except CheckpointError as error:
            LOGGER.warning("%s; going back to the step before it", error)
        tried.append(step)
        if on_damage is not None:
            on_damage(step)
    if tried:
        raise CheckpointError(
            f"none of the checkpoints in {directory} can be read: steps {', '.join(map(str, tried))} are damaged (see "
            "the warnings above); restore the files from a copy, or start again in a new run directory"
        )
    return None


def _restore_step(path: Path, step: int, target: Any, subtree: str | None) -> Restored:
    """Read on every process first, then verify together: a process that fails alone must not leave the others waiting."""
    prefix = f"{subtree}/" if subtree else ""
    wanted = flatten(target, prefix=prefix)
    record, saved, arrays, problem = None, {}, {}, None
    try:
        record = read_record(path)
        saved = {name: leaf for name, leaf in record.leaves.items() if name.startswith(prefix)}
        _check_fit(path, saved, wanted)
        arrays = _read_arrays(path, {name: _plain(leaf) for name, leaf in wanted.items()})
    except UserError as error:
        problem = error
    if not _everywhere(problem is None) or record is None:
        raise problem or CheckpointError(f"checkpoint {path} is damaged: another process cannot read its part")
    found = digests({name: arrays[name] for name in wanted})
    altered = [name for name in wanted if found[name] != saved[name].digest]
    if altered:
        shown = ", ".join(altered[:5]) + (f" and {len(altered) - 5} more" if len(altered) > 5 else "")
        raise CheckpointError(f"checkpoint {path} is damaged: the bits of {shown} are not those that were saved")
    leaves = [
        jax.random.wrap_key_data(arrays[name], impl=saved[name].key_impl) if is_key(leaf) else arrays[name]
        for name, leaf in wanted.items()
    ]
    return Restored(step, jax.tree.unflatten(jax.tree.structure(target), leaves), record.data, record.meta)


def _check_fit(path: Path, saved: dict[str, Leaf], wanted: dict[str, Any]) -> None:
    lines = difference(saved, table(wanted))
    if lines:
        raise UserError(
            f"checkpoint {path} does not fit this model:\n{lines}\nA state is restored whole or not at all. Use the "
            "config that the run was started with (config.yaml in its directory), or a new run directory."
        )


def _read_arrays(path: Path, plain: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Read arrays as they are stored; involves no other process."""
    silence_orbax()
    ignore_abandoned_reads()
    stored = {name: leaf for name, leaf in plain.items() if leaf.size}
    options = {
        name: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)
        for name, leaf in stored.items()
    }
    arguments = ocp.args.PyTreeRestore(stored, restore_args=options, partial_restore=True)
    handler = ocp.PyTreeCheckpointHandler()
    try:
        arrays = handler.restore(epath.Path(path.absolute() / "state"), args=arguments) if stored else {}
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise  # the machine's trouble, not the checkpoint's
    except Exception as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {reason_of(error)}") from error
    finally:
        handler.close()
    for name, leaf in plain.items():
        if not leaf.size:
            empty = np.zeros(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
            arrays[name] = jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda _, empty=empty: empty)
    return arrays


def _plain(leaf: Any) -> jax.ShapeDtypeStruct:
    """The target of one leaf as it is stored: PRNG keys as their uint32 data, the sharding always given."""
    sharding = leaf.sharding
    if sharding is None:
        if jax.process_count() > 1:
            raise ValueError("a target without sharding cannot be restored in a run of several processes")
        sharding = SingleDeviceSharding(jax.devices()[0])
    if not is_key(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    bits = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return jax.ShapeDtypeStruct(bits.shape, bits.dtype, sharding=_with_trailing_dim(sharding, len(leaf.shape)))


def _with_trailing_dim(sharding: Sharding, ndim: int) -> Sharding:
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = (*sharding.spec, *(None,) * (ndim - len(sharding.spec)), None)
    return NamedSharding(sharding.mesh, PartitionSpec(*spec), memory_kind=sharding.memory_kind)


def _newest(directory: Path) -> int:
    steps = committed_steps(directory)
    step = _from_first_process(steps[-1] if steps else -1)
    if step < 0:
        raise CheckpointError(f"there is no committed checkpoint in {directory}; has the run saved one yet?")
    return step


def _from_first_process(value: int) -> int:
    """Let every process act on what the first one sees, however the shared disk lags."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _everywhere(fine: bool) -> bool:
    """Tell whether all processes are fine."""
    if jax.process_count() == 1:
        return fine
    return bool(np.all(multihost_utils.process_allgather(np.bool_(fine))))
