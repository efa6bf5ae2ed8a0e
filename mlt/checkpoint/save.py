"""Write checkpoints while training goes on."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from mlt.checkpoint.digest import digests, in_host_memory
from mlt.checkpoint.layout import (
    LOGGER,
    CheckpointError,
    committed_steps,
    encode,
    read_leaves,
    set_aside,
    step_path,
    unfinished,
)
from mlt.checkpoint.leaves import Leaf, flatten, is_key, table
from mlt.checkpoint.restore import Restored, restore, restore_latest
from mlt.checkpoint.storage import reason_of, silence_orbax


class Checkpointer:
    """The writer of one checkpoint directory; the caller sees to it that there is one (the run lock).

    `save` returns as soon as the state is copied to host memory and writes on in the background. A failure of the
    background write is raised by the next call. Use it as a context manager, or `close` it: a process that ends
    without leaves its last step unfinished.
    """

    def __init__(self, directory: str | Path, *, keep: int = 3, keep_every_steps: int | None = None) -> None:
        """Remember where; nothing is created before the first save.

        Args:
          directory: where the step directories go, e.g. <run>/checkpoints.
          keep: how many of the newest steps stay; older ones are deleted after a newer one is committed.
          keep_every_steps: steps divisible by this stay for good.
        """
        if keep < 1:
            raise ValueError(f"keep={keep} would delete every checkpoint; it must be at least 1")
        self.directory = Path(directory).absolute()
        self._keep, self._keep_every_steps = keep, keep_every_steps
        self._manager: ocp.CheckpointManager | None = None
        self._writing: int | None = None

    def save(self, step: int, state: Any, *, data: Mapping[str, Any], meta: Mapping[str, Any]) -> bool:
        """Start to write a step; all processes of a run call it together.

        The state may be donated to the next train step at once. First waits for the previous save.

        Args:
          step: its number, not negative.
          state: tree of jax arrays of any type and sharding, typed PRNG keys included.
          data: position in the data, JSON.
          meta: what else to record, JSON; `read_meta` reads it without the arrays.

        Returns:
          False where the very same state is already saved under this step, so nothing needs to be written.

        Raises:
          CheckpointError: the previous or this write failed, or the step is saved with another state.
          TypeError: a leaf is not a jax array, or `data` or `meta` is not JSON.
        """
        self.wait()
        flat = flatten(state)
        arrays = {path: _own(jax.random.key_data(x) if is_key(x) else x) for path, x in flat.items()}
        leaves = table(flat, digests(arrays))
        meta_item, data_item = encode(meta, data, leaves)
        if self._already_saved(step, leaves):
            return False
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave({path: x for path, x in arrays.items() if x.size}),
            data=ocp.args.JsonSave(data_item),
            meta=ocp.args.JsonSave(meta_item),
        )
        self._writing = step
        with self._failures():
            self._open().save(step, args=items, force=True)
        return True

    def wait(self) -> None:
        """Block until the running save is committed.

        Raises:
          CheckpointError: it failed; training may go on and save again.
        """
        if self._manager is not None:
            with self._failures():
                self._manager.wait_until_finished()
            self._writing = None

    def close(self) -> None:
        """Wait for the running save and release the threads. The checkpointer can be used again afterwards.

        Raises:
          CheckpointError: the running save failed.
        """
        if self._manager is not None:
            self.wait()
            with self._failures():
                self._manager.close()
            self._manager = None

    def steps(self) -> list[int]:
        """List the committed steps in ascending order."""
        return committed_steps(self.directory)

    def latest_step(self) -> int | None:
        """Give the newest committed step; half-written ones are named in a warning and do not count."""
        for path in unfinished(self.directory):
            if path.name.split(".")[0] != str(self._writing):
                LOGGER.warning("ignoring unfinished checkpoint %s: its writer died", path)
        return max(self.steps(), default=None)

    def restore(self, target: Any, *, step: int | None = None, subtree: str | None = None) -> Restored:
        """Restore one step exactly; see `mlt.checkpoint.restore.restore`."""
        self.wait()
        return restore(self.directory, target, step=step, subtree=subtree)

    def restore_latest(self, target: Any) -> Restored | None:
        """Restore the newest readable step; damaged ones are set aside as <step>.damaged, never deleted.

        See `mlt.checkpoint.restore.restore_latest`.
        """
        self.close()
        return restore_latest(self.directory, target, on_damage=lambda step: self._set_aside([step]))

    def discard_after(self, step: int) -> list[int]:
        """Delete the steps later than `step`, after a run went back to it and takes another course from there.

        Returns:
          The deleted steps.
        """
        self.wait()
        later = [other for other in self.steps() if other > step]
        for other in later:
            self._open().delete(other)
        return later

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            with contextlib.suppress(CheckpointError):
                self.close()

    def _already_saved(self, step: int, leaves: dict[str, Leaf]) -> bool:
        if step in self.steps():
            if read_leaves(self.directory, step) == leaves:
                return True
            raise CheckpointError(
                f"{step_path(self.directory, step)} already holds another state of step {step}; call discard_after "
                "when a run goes back to an earlier step, or save into another directory"
            )
        return False

    def _set_aside(self, steps: list[int]) -> None:
        """Make room for steps that are to be saved again."""
        if jax.process_index() == 0:
            for step in steps:
                moved = set_aside(step_path(self.directory, step))
                LOGGER.warning("checkpoint step %d was set aside as %s; delete it when it is of no use", step, moved)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("mlt_checkpoint_set_aside")

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            silence_orbax()
            self._set_aside([int(path.name) for path in unfinished(self.directory) if path.name.isdigit()])
            policies = ocp.checkpoint_managers.preservation_policy
            every = [policies.EveryNSteps(self._keep_every_steps)] if self._keep_every_steps else []
            kept = [policies.LatestN(self._keep), *every]
            options = ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(kept), cleanup_tmp_directories=True
            )
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        return self._manager

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Turn whatever the storage raises into one CheckpointError, and start afresh after it."""
        try:
            yield
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
            where = self.directory if self._writing is None else step_path(self.directory, self._writing)
            manager, self._manager, self._writing = self._manager, None, None
            if manager is not None:
                with contextlib.suppress(Exception):
                    manager.close()
            raise CheckpointError(
                f"could not write checkpoint {where}: {reason_of(error)}. Committed steps are "
                "untouched; free space on the disk or make it writable, and the next save starts afresh"
            ) from error


def _own(array: jax.Array) -> jax.Array:
    """Copy what already is in host memory: it would be written from the very buffer the next step is given."""
    if not in_host_memory(array):
        return array
    # Shard by shard: copying the whole of an array that several processes hold would be a compiled program of its own.
    shards = [jax.device_put(shard.data, shard.data.sharding, may_alias=False) for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)
