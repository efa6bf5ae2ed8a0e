"""Copy committed steps to the durable place in the background. Nothing it meets ever stops a run."""

import dataclasses
import threading
import time
from pathlib import Path
from typing import NamedTuple

from mlt.checkpoint.durable import Durable
from mlt.checkpoint.keep import Keep
from mlt.checkpoint.layout import LOGGER


@dataclasses.dataclass(frozen=True)
class DurableOptions:
    """Attributes:
    place: a path, or a URL that TensorStore can write (gs://, s3://); of this run alone.
    every_steps: steps divisible by this are copied.
    keep: how many of the newest steps stay there.
    keep_every_steps: steps divisible by this stay there for good.
    wait_seconds: how long the end of a process waits for a copy that is under way.
    """

    place: str | Path
    every_steps: int
    keep: int = 3
    keep_every_steps: int | None = None
    wait_seconds: float = 120.0


class CopyState(NamedTuple):
    """Attributes:
    step: the newest step that was copied and verified by this process; None before the first.
    failures: copies that failed so far.
    skipped: steps that were passed over, because a newer one was due before the one before them was copied.
    failing: the last copy failed.
    """

    step: int | None = None
    failures: int = 0
    skipped: int = 0
    failing: bool = False


class Copier:
    """One thread, one copy at a time; of the steps that wait, only the newest is copied."""

    def __init__(self, options: DurableOptions) -> None:
        """Start nothing yet."""
        self.durable = Durable(options.place)
        self._keep = Keep(options.keep, options.keep_every_steps)
        self._wait_seconds = options.wait_seconds
        self._changed = threading.Condition()
        self._waiting: tuple[int, Path] | None = None
        self._running: int | None = None
        self._state = CopyState()
        self._thread: threading.Thread | None = None

    @property
    def state(self) -> CopyState:
        """What has been copied, and what went wrong."""
        with self._changed:
            return self._state

    def pinned(self) -> set[int]:
        """The local steps that are still needed here."""
        with self._changed:
            return {step for step in (self._running, self._waiting and self._waiting[0]) if step is not None}

    def submit(self, step: int, path: Path) -> None:
        """Copy a committed local step when the copies before it are done."""
        with self._changed:
            if self._waiting is not None and self._waiting[0] != step:
                self._state = self._state._replace(skipped=self._state.skipped + 1)
                LOGGER.warning(
                    "the durable copy of step %d is skipped: %s is slower than one copy in checkpoint.durable_every_steps",
                    self._waiting[0],
                    self.durable.url,
                )
            self._waiting = (step, path)
            if self._thread is None or not self._thread.is_alive():
                # A daemon: a place that hangs must not keep the process from ending.
                self._thread = threading.Thread(target=self._work, name="mlt-durable", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def drain(self) -> None:
        """Wait until nothing is left to copy, with a warning where that takes too long."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._waiting is None and self._running is None, self._wait_seconds):
                step = self._running if self._waiting is None else self._waiting[0]
                LOGGER.warning(
                    "step %s is not copied to %s after %.0f s; not waiting any longer (checkpoint.durable_wait_seconds). The "
                    "local checkpoint is whole, and the next start of the run copies it",
                    step,
                    self.durable.url,
                    self._wait_seconds,
                )

    def discard_after(self, step: int) -> None:
        """Delete the durable steps later than `step`, and drop what waits."""
        with self._changed:
            self._waiting = None
        self.drain()
        try:
            for later in [other for other in self.durable.steps() if other > step]:
                self.durable.delete(later)
        except OSError as error:
            LOGGER.warning(
                "cannot delete the steps after %d in %s: %s; they are of a course the run left. Delete them before the run "
                "starts again, or it may resume from them",
                step,
                self.durable.url,
                error.strerror or error,
            )

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: self._waiting is not None, 60.0) or self._waiting is None:
                    self._thread = None
                    return
                (step, path), self._waiting = self._waiting, None
                self._running = step
            copied = self._copy(step, path)
            with self._changed:
                failures = self._state.failures + (not copied)
                newest = step if copied else self._state.step
                self._state = self._state._replace(step=newest, failures=failures, failing=not copied)
                self._running = None
                self._changed.notify_all()

    def _copy(self, step: int, path: Path) -> bool:
        started = time.monotonic()
        try:
            size = self.durable.copy(step, path)
            for old in self._keep.superfluous(self.durable.steps()):
                self.durable.delete(old)
        except Exception as error:
            reason = _reason(error)
            LOGGER.warning(
                "ALARM: could not copy checkpoint step %d to %s: %s. Training goes on with the local checkpoints alone; free "
                "space there or make it writable, and the next copy starts afresh",
                step,
                self.durable.url,
                reason,
            )
            return False
        if size:
            LOGGER.info("step %d copied to %s: %d bytes in %.1f s", step, self.durable.url, size, time.monotonic() - started)
        return True


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error) or type(error).__name__
