"""What the host makes of the guard's decisions: a record of each skipped step, the way back, the end.

A skipped step counts as a step and its batch is used up. After `max_consecutive_skips` in a row the run goes back to the
newest regular checkpoint from before the first of them and reads on behind the last of them, as PaLM's training did
(arXiv 2204.02311, section 5.1): another course from there, since the same batches would lead to the same place. Everything it
depends on is in the checkpoint, so a resumed run takes the same course.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mlt.errors import RunFailed
from mlt.train.guard import GuardConfig

_MOST_DOCUMENTS = 5000  # named in a record


@dataclasses.dataclass(frozen=True)
class Flight:
    """A step that the devices work on, and what it was given.

    Attributes:
        step: its number.
        metrics: scalars it gives.
        batch: this process's rows of its batch, on the host.
        before: the position in the data at which its batch starts (`Loader.state`).
        after: the position behind its batch.
    """

    step: int
    metrics: Mapping[str, Any]
    batch: Mapping[str, np.ndarray]
    before: Mapping[str, Any]
    after: Mapping[str, Any]


class RollBack(Exception):
    """Too many steps in a row were skipped: go back, and read on behind them.

    Attributes:
        last: the last skipped step.
        first: the first one of the row.
        position: behind the batch of the last one.
    """

    def __init__(self, last: int, first: int, position: Mapping[str, Any]) -> None:
        super().__init__(last, first)
        self.last, self.first, self.position = last, first, position


@dataclasses.dataclass(frozen=True)
class Course:
    """How a run came to where it is; saved with every checkpoint.

    Attributes:
        from_seed: it started from drawn parameters, not from an imported model.
        rollbacks: [step it left, step it went back to, first skipped step] of each, oldest first. The batches that those
            steps had read are not read again.
    """

    from_seed: bool = False
    rollbacks: tuple[tuple[int, int, int], ...] = ()

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> "Course":
        """Read back what `meta` gave; what was saved by something else, an import, has none of it."""
        return cls(meta.get("from_seed", False), tuple((left, to, first) for left, to, first in meta.get("rollbacks", ())))

    def meta(self) -> dict[str, Any]:
        """What a checkpoint records."""
        return {"from_seed": self.from_seed, "rollbacks": [list(one) for one in self.rollbacks]}

    def back(self, asked: RollBack, to: int) -> "Course":
        """The course after another rollback."""
        return dataclasses.replace(self, rollbacks=(*self.rollbacks, (asked.last, to, asked.first)))


def way_back(steps: Sequence[int], first: int, every: int) -> int:
    """Which of the saved steps to go back to when `first` and those after it were skipped; -1 if none is from before.

    Steps saved at the interval `every` come before those saved on request: a run that was asked to stop on the way goes back
    to the same step as one that was not.
    """
    before = [step for step in steps if step < first]
    return max([step for step in before if step % every == 0] or before, default=-1)


class SkipWatch:
    """Looks at every step's verdict once the step is done.

    Attributes:
        in_a_row: steps skipped since the last accepted one, as far as is known.
        advice: what to do about it, for messages.
        documents: what a row of the data is made of: name of the document, first token in it, number of tokens.
    """

    def __init__(
        self,
        config: GuardConfig,
        *,
        write: Callable[[Mapping[str, Any]], None],
        say: Callable[[str], None],
        advice: str,
    ) -> None:
        """Take what to do.

        Args:
          config: when to go back.
          write: takes a record.
          say: takes a line for whoever watches.
          advice: where to go from here if the run ends; the end of a message.
        """
        self._config, self._write, self._say, self.advice = config, write, say, advice
        self.in_a_row = 0
        self.documents: Callable[[int], list[tuple[str, int, int]]] = lambda row: []

    def settle(self, flight: Flight) -> bool:
        """Wait for a step; whether it was skipped.

        Raises:
          RollBack: it was the last one that may be skipped in a row.
          RunFailed: no step may be skipped.
        """
        self.in_a_row = int(flight.metrics["guard/consecutive_skips"])
        if not self.in_a_row:
            return False
        what = self._reason(flight.metrics)
        if not self._config.skips:
            raise RunFailed(
                f"{what} at step {flight.step}, and train.guard.max_consecutive_skips is 0: no step may be skipped. {self.advice}"
            )
        most = self._config.max_consecutive_skips
        self._say(f"step {flight.step} skipped: {what} ({self.in_a_row} in a row; at {most} the run goes back)")
        self._write(self._record(flight, what))
        if self.in_a_row >= most:
            raise RollBack(flight.step, flight.step - self.in_a_row + 1, flight.after)
        return True

    def _reason(self, metrics: Mapping[str, Any]) -> str:
        for name in ("loss", "grad_norm"):
            value, limit = float(metrics[f"train/{name}"]), metrics.get(f"guard/{name}_limit")
            if not math.isfinite(value):
                return f"train/{name} is {value}"
            if limit is not None and value > float(limit):
                return f"train/{name} is {value:.4g}, above its limit of {float(limit):.4g}"
        return "the guard refused it"

    def _record(self, flight: Flight, what: str) -> dict[str, Any]:
        """What brings the batch back: its position in the data, and the documents it is made of."""
        first, end = flight.before["rows"], flight.after["rows"]
        named: list[dict[str, Any]] = []
        for row in range(first, end):
            parts = self.documents(row)
            named += [{"row": row, "document": name, "from_token": start, "tokens": count} for name, start, count in parts]
            if len(named) >= _MOST_DOCUMENTS:
                break
        return {
            "step": flight.step,
            "time": time.time(),
            "reason": what,
            "in_a_row": self.in_a_row,
            **{name: str(float(flight.metrics[f"train/{name}"])) for name in ("loss", "grad_norm")},
            "rows": [first, end - 1],
            "data": dict(flight.before),
            "documents": named[:_MOST_DOCUMENTS],
        }
