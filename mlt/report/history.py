"""What metrics.jsonl and samples.jsonl tell, read whatever state a crash left them in."""

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlt.report.goodput import Account

_NOT_METRICS = ("step", "time", "kind", "nonfinite")


@dataclass(frozen=True)
class Series:
    """One metric over the run: `steps` ascending, `values` of the same length, NaN where a value was not finite."""

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    def finite(self) -> "Series":
        """Leave out what is not finite."""
        keep = np.isfinite(self.values)
        return Series(self.steps[keep], self.values[keep])

    def last(self) -> float | None:
        """Give the last value, None where there is none."""
        return float(self.values[-1]) if len(self) else None


@dataclass
class History:
    """A run as its files tell it.

    Attributes:
      series: metric name -> values.
      starts: the facts of each start or resume, oldest first; "step" is the one it went on after.
      rollbacks: where the run went back, oldest first: "from_step", and "step" it went on after.
      seconds: time spent, from each start to the last row that follows it.
      last_time: when the last row was written, in seconds since 1970; 0 where there is none.
    """

    series: dict[str, Series] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)
    rollbacks: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    last_time: float = 0.0

    def get(self, name: str) -> Series:
        """Give a metric; an empty series where it was never logged."""
        return self.series.get(name, Series(np.zeros(0), np.zeros(0)))

    def last_step(self) -> int:
        """Give the last step that any metric was logged for."""
        return int(max((series.steps[-1] for series in self.series.values() if len(series)), default=0))

    def fact(self, name: str) -> Any:
        """Give a fact of the latest start that has it."""
        return next((start[name] for start in reversed(self.starts) if name in start), None)

    def resumes(self) -> list[int]:
        """Give the steps that the run was resumed after."""
        return [int(start["step"]) for start in self.starts[1:]]

    def not_finite(self) -> dict[str, np.ndarray]:
        """Map each metric that was ever NaN or infinite to the steps at which it was."""
        bad = {name: series.steps[~np.isfinite(series.values)] for name, series in self.series.items()}
        return {name: steps for name, steps in bad.items() if len(steps)}


def read_history(path: Path) -> History:
    """Read metrics.jsonl; a missing file is an empty history, a line that is no row is passed over."""
    history, columns, since = History(), {}, None
    for row in read_rows(path):
        at = row.get("time")
        if isinstance(at, (int, float)):
            restarted = row.get("kind") == "start" or since is None
            history.seconds += 0.0 if restarted or since is None else max(0.0, at - since)
            since = history.last_time = at
        if row.get("kind") in ("start", "rollback"):
            (history.starts if row["kind"] == "start" else history.rollbacks).append(row)
            continue
        for name, value in row.items():
            if name not in _NOT_METRICS and (value is None or _is_number(value)):
                columns.setdefault(name, []).append((row["step"], np.nan if value is None else float(value)))
    history.series = {name: _series(points) for name, points in columns.items()}
    return history


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Iterate over the rows of a JSON Lines file that have a step."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and _is_number(row.get("step")):
                yield row


def read_account(path: Path) -> Account:
    """Read logs/goodput.jsonl: seconds by cause; of a missing file, none."""
    account = Account()
    for row in read_rows(path):
        account.add(row)
    return account


def wait_share(history: History) -> Series:
    """Share of the time between two logged steps that was spent waiting for data, in percent."""
    waits, pace = history.get("data/wait_seconds"), history.get("throughput/step_seconds")
    if not len(waits) or not np.array_equal(waits.steps, pace.steps):
        return Series(np.zeros(0), np.zeros(0))
    resumed = [start["step"] for start in history.starts]
    before = np.concatenate([[min(resumed, default=0)], waits.steps[:-1]])
    for step in resumed:
        index = np.searchsorted(waits.steps, step, side="right")
        if index < len(before):
            before[index] = max(before[index], step)
    elapsed = pace.values * np.maximum(waits.steps - before, 1)
    return Series(waits.steps, 100 * np.clip(waits.values / np.maximum(elapsed, 1e-12), 0, 1))


def smooth(series: Series) -> Series:
    """Moving average over about a thirtieth of the points, taken twice.

    The window reaches as far ahead as back, so the line does not lag; it is short at the steep start, one-sided at the end.
    """
    count = len(series)
    index, values = np.arange(count), series.values
    back = np.minimum(max(1, count // 80), index)
    ahead = np.minimum(back, count - 1 - index)
    for _ in range(2):
        sums = np.concatenate([[0.0], np.cumsum(values)])
        values = (sums[index + ahead + 1] - sums[index - back]) / (back + ahead + 1)
    return Series(series.steps, values)


def thin(series: Series, limit: int = 1000) -> Series:
    """Keep at most `limit` points: the least and the greatest of each stretch, so that no spike is lost."""
    if len(series) <= limit:
        return series
    kept = {0, len(series) - 1}
    edges = np.linspace(0, len(series), (limit - 2) // 2 + 1).astype(int)
    for start, stop in itertools.pairwise(edges):
        part = series.values[start:stop]
        kept.update((start + int(np.argmin(part)), start + int(np.argmax(part))))
    order = np.array(sorted(kept))
    return Series(series.steps[order], series.values[order])


def families(names: list[str]) -> dict[str, list[str]]:
    """Group names that differ only in their numbers: "moe/blocks.*/load" -> one name per block."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    return {family if len(members) > 1 else members[0]: members for family, members in groups.items()}


def _series(points: list[tuple[float, float]]) -> Series:
    steps, values = np.array(points, np.float64).T
    order = np.argsort(steps, kind="stable")
    return Series(steps[order], values[order])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
