"""The clock of a run: every second of the main thread goes to one cause, and to logs/goodput.jsonl."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mlt.report.goodput import Account
from mlt.report.history import read_account


class Goodput:
    """Accounts for this process's time, and for that of the run's earlier starts."""

    def __init__(
        self,
        path: Path,
        *,
        write: Callable[[Mapping[str, Any]], None],
        now: Callable[[], float] = time.monotonic,
        age: float | None = None,
    ) -> None:
        """Begin with what the file holds.

        Args:
          path: logs/goodput.jsonl of the run.
          write: takes a row for it.
          now: a clock.
          age: seconds that this process has taken already; None asks the system.
        """
        try:
            self.account = read_account(path)
        except OSError:
            self.account = Account()
        self._write, self._now = write, now
        self._cause = "startup"
        self._since = now()
        self._open: dict[str, float] = {"startup": _process_age() if age is None else age}  # since the last row
        self._steps, self._skips = 0, 0

    def start(self, step: int) -> None:
        """This process goes on after `step`."""
        self._append({"kind": "start", "step": step, "time": time.time()})

    @contextlib.contextmanager
    def during(self, cause: str) -> Iterator[None]:
        """Time spent in the block is of this cause, but for that of blocks inside it."""
        before = self._turn(cause)
        try:
            yield
        finally:
            self._turn(before)

    def stepped(self, *, skipped: bool) -> None:
        """A step is done."""
        self._steps, self._skips = self._steps + 1, self._skips + skipped

    def note(self, step: int) -> float:
        """Write down what was spent until `step`; the run's goodput so far."""
        self._turn(self._cause)
        seconds, self._open = self._open, {}
        if self._skips:
            wasted = seconds.get("step", 0.0) * self._skips / self._steps
            seconds["step"], seconds["skipped"] = seconds.get("step", 0.0) - wasted, seconds.get("skipped", 0.0) + wasted
        self._steps = self._skips = 0
        self._append({"step": step, "time": time.time(), "seconds": seconds})
        return self.account.goodput

    def rolled_back(self, step: int, to: int) -> None:
        """The steps after `to` were for nothing."""
        self.note(step)
        self._append({"kind": "rollback", "step": to, "time": time.time(), "from": step})

    def _turn(self, cause: str) -> str:
        now = self._now()
        self._open[self._cause] = self._open.get(self._cause, 0.0) + now - self._since
        before, self._cause, self._since = self._cause, cause, now
        return before

    def _append(self, row: dict[str, Any]) -> None:
        self.account.add(row)
        self._write(row)


_asked: list[bool] = []


def _process_age() -> float:
    """Seconds since this process was started, imports included; 0 when asked again, or where the system does not say."""
    if _asked:
        return 0.0
    _asked.append(True)
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        return float(Path("/proc/uptime").read_text().split()[0]) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0
