"""Ends a process that makes no progress: a device, a collective or a disk that hangs raises nothing by itself."""

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from mlt.errors import EXIT_LOST
from mlt.train.peers import Verdict, end_process

_LAST_RESORT_SECONDS = 120.0  # for a process whose threads are all held up, this one too


class Watchdog:
    """A thread that ends the process when too long passes between two calls of `progress`.

    It writes the stacks of all threads first. Time for which the process itself is stopped does not count.
    """

    def __init__(
        self,
        seconds: float | None,
        stacks_path: Path,
        *,
        tell: Callable[[int, str], None],
        end: Callable[[Verdict], None] = end_process,
    ) -> None:
        """Describe the watch.

        Args:
          seconds: how long a phase may take; None watches nothing.
          stacks_path: where the stacks go.
          tell: told of the exit code and the reason, for the other processes.
          end: ends the process.
        """
        self._seconds, self._path, self._tell, self._end = seconds, stacks_path, tell, end
        self._phase, self._passed = "starting", 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="mlt-watchdog", daemon=True)

    def progress(self, phase: str) -> None:
        """Note that a phase begins, such as "step 12"."""
        self._phase, self._passed = phase, 0.0

    def __enter__(self) -> Self:
        if self._seconds is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        if self._seconds is not None:
            self._thread.join()

    def _watch(self) -> None:
        assert self._seconds is not None
        interval = min(5.0, self._seconds / 10)
        with self._open_stacks() as stacks:
            try:
                self._watch_until_over(stacks, interval)
            finally:
                faulthandler.cancel_dump_traceback_later()
        with contextlib.suppress(OSError):
            if self._path.stat().st_size == 0:
                self._path.unlink()

    def _watch_until_over(self, stacks: TextIO, interval: float) -> None:
        assert self._seconds is not None
        last = time.monotonic()
        while not self._over.wait(interval):
            faulthandler.dump_traceback_later(self._seconds + _LAST_RESORT_SECONDS, exit=True, file=stacks)
            self._passed += min(time.monotonic() - last, 2 * interval)
            last = time.monotonic()
            if self._passed > self._seconds:
                faulthandler.dump_traceback(stacks, all_threads=True)
                reason = f"no progress for {self._seconds:g} s in {self._phase}; the stacks of all threads are in {self._path}"
                self._tell(EXIT_LOST, reason)
                self._end(Verdict(EXIT_LOST, f"hung: {reason}; the same command resumes"))
                return

    def _open_stacks(self) -> TextIO:
        """The file for the stacks; standard error where none can be made, as on a full disk."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            return self._path.open("a")
        except OSError:
            return os.fdopen(os.dup(2), "w")
