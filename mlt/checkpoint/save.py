"""Write checkpoints while training goes on."""

import concurrent.futures
import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

from mlt.checkpoint.copier import Copier, CopyState, DurableOptions
from mlt.checkpoint.digest import digests, in_host_memory
from mlt.checkpoint.durable import remember
from mlt.checkpoint.keep import Keep
from mlt.checkpoint.layout import (
    LOGGER,
    CheckpointError,
    StepFiles,
    clear_leftovers,
    committed_steps,
    delete_step,
    encode,
    read_leaves,
    set_aside,
    step_path,
    unfinished,
)
from mlt.checkpoint.leaves import Leaf, flatten, is_key, table
from mlt.checkpoint.restore import Restored, restore, restore_latest
from mlt.checkpoint.storage import reason_of
from mlt.checkpoint.writer import StepWriter, own


class Checkpointer:
    """The writer of one checkpoint directory; the caller sees to it that there is one (the run lock).

    `save` returns as soon as the state is copied to host memory. Digests, files, the deletion of old steps and the copy
    to the durable place are the business of background threads. A failure of the background write is raised by the next
    call; one of the durable place is a warning and a count in `durable_state`. Use it as a context manager, or `close`
    it: a process that is killed before leaves its last step unfinished.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int = 3,
        keep_every_steps: int | None = None,
        durable: DurableOptions | None = None,
    ) -> None:
        """Remember where; nothing is created before the first save.

        Args:
          directory: where the step directories go, e.g. <run>/checkpoints; shared by all processes of the run.
          keep: how many of the newest steps stay; older ones are deleted after a newer one is committed.
          keep_every_steps: steps divisible by this stay for good.
          durable: the second level; None has none.
        """
        self.directory = Path(directory).absolute()
        self._keep = Keep(keep, keep_every_steps)
        self._durable_options = durable
        self._copier = None if durable is None else Copier(durable)
        self._writer: StepWriter | None = None
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="mlt-checkpoint")
        self._job: concurrent.futures.Future[None] | None = None
        self._writing: int | None = None
        self.last_blocked_seconds = 0.0
        """How long the last `save` kept its caller, the wait for the save before it included."""

    @property
    def durable_state(self) -> CopyState | None:
        """How the copies to the durable place fare; None where there is no such place."""
        return None if self._copier is None else self._copier.state

    def save(
        self,
        step: int,
        state: Any,
        *,
        data: Mapping[str, Any],
        meta: Mapping[str, Any],
        durable: bool = False,
        prune: bool = True,
    ) -> bool:
        """Start to write a step; all processes of a run call it together.

        The state may be donated to the next train step at once. First waits for the previous save.

        Args:
          step: its number, not negative.
          state: tree of jax arrays of any type and sharding, typed PRNG keys included.
          data: position in the data, JSON.
          meta: what else to record, JSON; `read_meta` reads it without the arrays.
          durable: copy this step to the durable place whatever its number.
          prune: delete the local steps that are not to be kept; where not, the next save does it.

        Returns:
          False where the very same state is already saved under this step, so nothing needs to be written.

        Raises:
          CheckpointError: the previous write failed or this one cannot start, or the step is saved with another state.
          TypeError: a leaf is not a jax array, or `data` or `meta` is not JSON.
        """
        started = time.perf_counter()
        try:
            return self._start(step, state, data, meta, durable, prune)
        finally:
            self.last_blocked_seconds = time.perf_counter() - started

    def _start(self, step: int, state: Any, data: Mapping[str, Any], meta: Mapping[str, Any], durable: bool, prune: bool) -> bool:
        self.wait()
        flat = flatten(state)
        rows, words = table(flat), (_copied(meta), _copied(data))
        arrays = {path: own(jax.random.key_data(x) if is_key(x) else x) for path, x in flat.items()}
        # Several processes hash and begin to write together, in the order of the program; one does it beside the steps.
        alone = jax.process_count() == 1 and all(map(in_host_memory, arrays.values()))
        if step in self.steps():
            rows = _with_digests(rows, arrays)
            return self._check_same(step, rows)
        self._writing = step
        with self._failures():
            writer = self._open()
            path = step_path(self.directory, step)

            def write() -> None:
                meta_item, data_item = encode(*words, _with_digests(rows, arrays))
                writer.start(path, arrays, data_item, meta_item)

            def finish() -> None:
                if alone:
                    write()
                writer.finish()
                arrays.clear()
                self._committed(step, durable, prune)

            if not alone:
                write()
            self._job = self._pool.submit(finish)
        return True

    def wait(self) -> None:
        """Block until the running save is committed here; its durable copy may still be under way.

        Raises:
          CheckpointError: it failed; training may go on and save again.
        """
        job, self._job = self._job, None
        if job is not None:
            with self._failures():
                job.result()
        self._writing = None

    def close(self) -> None:
        """Wait for the running save and, for a bounded time, its durable copy; release the threads.

        The checkpointer can be used again afterwards.

        Raises:
          CheckpointError: the running save failed.
        """
        try:
            self.wait()
            if self._writer is not None:
                with self._failures():
                    self._writer.close()
                self._writer = None
                if jax.process_index() == 0:
                    clear_leftovers(self.directory)  # of saves that failed for want of room
        finally:
            if self._copier is not None:
                self._copier.drain()

    def steps(self) -> list[int]:
        """List the committed steps of the directory in ascending order."""
        return committed_steps(self.directory)

    def steps_anywhere(self) -> list[int]:
        """List the committed steps of both levels in ascending order.

        Raises:
          OSError: the durable place cannot be read.
        """
        far = [] if self._copier is None else self._copier.durable.steps()
        return sorted({*self.steps(), *far})

    def latest_step(self) -> int | None:
        """Give the newest committed step; half-written ones are named in a warning and do not count."""
        for path in unfinished(self.directory):
            if path.name.split(".")[0] != str(self._writing):
                LOGGER.warning("ignoring unfinished checkpoint %s: its writer died", path)
        return max(self.steps(), default=None)

    def restore(
        self, target: Any, *, step: int | None = None, subtree: str | None = None, dtypes: Mapping[str, str] | None = None
    ) -> Restored:
        """Restore one step of either level exactly; see `mlt.checkpoint.restore.restore`."""
        self.wait()
        place = None if self._copier is None else self._copier.durable
        return restore(self.directory, target, step=step, durable=place, subtree=subtree, dtypes=dtypes)

    def restore_latest(self, target: Any, *, dtypes: Mapping[str, str] | None = None) -> Restored | None:
        """Restore the newest readable step of either level; damaged ones are set aside, never deleted.

        A local step that the durable place lacks is then copied there. See `mlt.checkpoint.restore.restore_latest`.
        """
        self.close()
        place = None if self._copier is None else self._copier.durable
        found = restore_latest(self.directory, target, durable=place, dtypes=dtypes, on_damage=self._set_aside)
        if found is not None and found.source == str(step_path(self.directory, found.step)):
            self._copy_if_newer(found.step)
        return found

    def discard_after(self, step: int) -> list[int]:
        """Delete the steps later than `step` at both levels, after a run went back to it and takes another course.

        Returns:
          The deleted local steps.
        """
        self.wait()
        later = [other for other in self.steps() if other > step]
        if jax.process_index() == 0:
            for other in later:
                delete_step(step_path(self.directory, other))
            if self._copier is not None:
                self._copier.discard_after(step)
        _meet("discard_after")
        return later

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            with contextlib.suppress(CheckpointError):
                self.close()

    def _check_same(self, step: int, rows: dict[str, Leaf]) -> bool:
        if read_leaves(self.directory, step) == rows:
            return False
        raise CheckpointError(
            f"{step_path(self.directory, step)} already holds another state of step {step}; call discard_after "
            "when a run goes back to an earlier step, or save into another directory"
        )

    def _committed(self, step: int, durable: bool, prune: bool) -> None:
        """What follows a commit, in the background, on the first process."""
        if jax.process_index() != 0:
            return
        options, pinned = self._durable_options, set[int]()
        if options is not None and self._copier is not None:
            if durable or step % options.every_steps == 0:
                self._copy(step)
            pinned = self._copier.pinned()
        try:
            for old in self._keep.superfluous(self.steps(), pinned) if prune else ():
                delete_step(step_path(self.directory, old))
        except (OSError, CheckpointError) as error:  # the step is committed: the other processes go on, and so does this one
            LOGGER.warning("cannot delete an old checkpoint in %s: %s; delete it by hand", self.directory, error)

    def _copy(self, step: int) -> None:
        assert self._copier is not None
        try:
            remember(self.directory, self._copier.durable)
        except OSError as error:
            LOGGER.warning("cannot note the durable place in %s: %s; training goes on", self.directory, error.strerror)
        self._copier.submit(step, step_path(self.directory, step))

    def _copy_if_newer(self, step: int) -> None:
        """Make up for a copy that the last process of the run did not get to."""
        if self._copier is None or jax.process_index() != 0:
            return
        try:
            missing = step > max(self._copier.durable.steps(), default=-1)
        except OSError:
            return  # the restore has said so
        if missing:
            self._copy(step)

    def _set_aside(self, files: StepFiles) -> None:
        """Make room for a step that is to be saved again."""
        if jax.process_index() == 0:
            local = step_path(self.directory, files.step)
            if files.name == str(local):
                moved = set_aside(local)
                LOGGER.warning("checkpoint step %d was set aside as %s; delete it when it is of no use", files.step, moved)
            elif self._copier is not None:
                try:
                    self._copier.durable.set_aside(files.step)
                    LOGGER.warning("the durable copy %s was set aside; the next copy of its step replaces it", files.name)
                except OSError as error:
                    LOGGER.warning("cannot set aside the damaged %s: %s; delete it by hand", files.name, error.strerror)
        _meet("set_aside")

    def _open(self) -> StepWriter:
        if self._writer is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in unfinished(self.directory):
                if path.name.isdigit():
                    self._set_aside(StepFiles(int(path.name), str(path), lambda _: b"", lambda _: {}))
            if jax.process_index() == 0:
                clear_leftovers(self.directory)
            _meet("open")
            self._writer = StepWriter()
        return self._writer

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Turn whatever the storage raises into one CheckpointError, and start afresh after it."""
        try:
            yield
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
            where = self.directory if self._writing is None else step_path(self.directory, self._writing)
            writer, self._writer, self._writing = self._writer, None, None
            if writer is not None:
                with contextlib.suppress(Exception):
                    writer.close()
            if jax.process_count() == 1:
                with contextlib.suppress(Exception):
                    clear_leftovers(self.directory)  # a full disk needs the room
            raise CheckpointError(
                f"could not write checkpoint {where}: {reason_of(error)}. Committed steps are "
                "untouched; free space on the disk or make it writable, and the next save starts afresh"
            ) from error


def _with_digests(rows: Mapping[str, Leaf], arrays: Mapping[str, jax.Array]) -> dict[str, Leaf]:
    found = digests(arrays)
    return {path: row._replace(digest=found[path]) for path, row in rows.items()}


def _copied(words: Mapping[str, Any]) -> dict[str, Any]:
    """A copy, so that the caller may go on changing its own; TypeError where it is not JSON."""
    return json.loads(json.dumps(words))


def _meet(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"mlt_checkpoint_{name}")
