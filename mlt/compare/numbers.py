"""The numbers of one run: what its model costs, and what its metrics say."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlt.compare.planned import Planned
from mlt.model.count import Count, count, decoding_bytes
from mlt.report.history import History, Series, read_history
from mlt.train.setup import describe_model

STATE_TOKENS = 131_072
TRAINING = 3
"""FLOPs of forward and backward over those of forward."""


@dataclasses.dataclass(frozen=True)
class Numbers:
    """What is known of one run; None where it is not known yet.

    Attributes:
        planned: the run.
        count: of its model, at the run's row length.
        state_bytes: what decoding keeps of one sequence after 131,072 tokens.
        history: its metrics.
        failed: why it did not finish.
    """

    planned: Planned
    count: Count
    state_bytes: int
    history: History
    failed: str | None = None

    @property
    def steps(self) -> int:
        """Steps that metrics were logged for."""
        return self.history.last_step()

    @property
    def flops_per_step(self) -> float:
        """Training FLOPs of a step: forward and backward, rows full, tables as look-ups."""
        return TRAINING * self.count.flops_per_token * self.planned.config.data.tokens_per_batch

    def values(self, equal_flops: float | None) -> dict[str, float | None]:
        """Column -> value.

        Args:
            equal_flops: training FLOPs at which losses are compared.
        """
        loss = self.history.get("train/loss").finite()
        speed = self.history.get("throughput/tokens_per_second").finite()
        last = lambda name: self.history.get(name).finite().last()  # noqa: E731
        return {
            "parameters": self.count.params,
            "active": self.count.active_params,
            "in_tables": self.count.table_params,
            "flops_per_token": self.count.flops_per_token,
            "state_bytes": self.state_bytes,
            "steps": self.steps,
            "tokens": last("train/tokens"),
            "train_loss": loss_at(loss, loss.steps[-1]) if len(loss) else None,
            "eval_loss": last("eval/loss"),
            "bits_per_byte": last("eval/bits_per_byte"),
            "tokens_per_second": float(np.median(speed.values)) if len(speed) else None,
            "loss_at_equal_flops": loss_at(loss, equal_flops / self.flops_per_step) if len(loss) and equal_flops else None,
        }


def read_numbers(run: Planned, failed: str | None = None) -> Numbers:
    """Read a run's metrics, and describe its model; nothing is allocated."""
    specs = describe_model(run.config)
    total = count(run.config.model, specs, run.config.data.sequence_length)
    return Numbers(run, total, decoding_bytes(specs, STATE_TOKENS), read_history(run.paths.metrics_path), failed)


def equal_flops(found: Sequence[Numbers]) -> float | None:
    """Training FLOPs that every run has spent; None where one has not begun."""
    spent = [numbers.steps * numbers.flops_per_step for numbers in found]
    return min(spent) if spent and min(spent) > 0 else None


def loss_at(loss: Series, step: float) -> float:
    """Mean of what was logged in a tenth of the steps: up to the logged step nearest to `step`. One batch's loss says little."""
    last = loss.steps[np.argmin(np.abs(loss.steps - step))]
    return float(loss.values[(loss.steps > 0.9 * last) & (loss.steps <= last)].mean())


def as_json(numbers: Numbers, equal: float | None) -> dict[str, Any]:
    """One run for compare.json."""
    run = numbers.planned
    return {
        "run": run.name,
        "label": run.label,
        "path": str(run.paths.path),
        "config": str(run.source),
        "args": dict(run.args),
        "seed": run.config.train.seed,
        "failed": numbers.failed,
        **numbers.values(equal),
    }
