"""Where the time of a run went: seconds by cause over all its starts, from the rows of logs/goodput.jsonl.

Productive is the time of steps that are part of the trained model. Steps done after the last save are lost when the run is
killed, and steps before a rollback are left behind: both are found out later, so each row says up to which step its time went.
"""

from collections.abc import Mapping
from typing import Any

CAUSES: dict[str, str] = {
    "step": "training steps",
    "compile": "compilation",
    "startup": "start-up and restore",
    "data": "waiting for data",
    "evaluation": "evaluation and samples",
    "checkpoint": "saving",
    "check": "repeated steps",
    "skipped": "skipped steps",
    "rolled_back": "steps rolled back",
    "lost": "steps lost in a restart",
}
"""Cause -> what a reader calls it. The first is productive."""


class Account:
    """Adds up rows in the order they were written.

    Attributes:
        seconds: cause -> seconds.
        down: seconds between a process's last row and the next start; part of no cause.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(CAUSES, 0.0)
        self.down = 0.0
        self._parts: list[tuple[int, int, float]] = []  # (from step, to step, productive seconds), none overlapping
        self._step, self._time = 0, 0.0

    def add(self, row: Mapping[str, Any]) -> None:
        """Take one row: a start, a rollback, or the seconds since the row before."""
        kind, step, at = row.get("kind"), int(row["step"]), float(row.get("time", 0.0))
        if kind == "start":
            self.down += max(0.0, at - self._time) if self._time else 0.0
            self._undo(step, "lost")
        elif kind == "rollback":
            self._undo(step, "rolled_back")
        for cause, seconds in row.get("seconds", {}).items():
            self.seconds[cause] = self.seconds.get(cause, 0.0) + seconds
        done = row.get("seconds", {}).get("step", 0.0)
        if step > self._step and done:
            self._parts.append((self._step, step, done))
        self._step, self._time = step, at

    @property
    def total(self) -> float:
        """Seconds of all causes."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """Share of productive time; 0 before there is any time."""
        return self.seconds["step"] / self.total if self.total else 0.0

    def _undo(self, step: int, cause: str) -> None:
        """Steps after `step` turn out to have been for nothing."""
        while self._parts and self._parts[-1][1] > step:
            first, last, seconds = self._parts.pop()
            kept = seconds * max(0, step - first) / (last - first)
            if kept:
                self._parts.append((first, step, kept))
            self.seconds["step"] -= seconds - kept
            self.seconds[cause] += seconds - kept
            if kept:
                break
