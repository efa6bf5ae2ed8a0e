"""Muon (Keller Jordan, 2024; arXiv 2502.16982): momentum made orthogonal for matrices, AdamW for everything else."""

from collections.abc import Iterator
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from mlt.config.problems import Problem
from mlt.nn.param import ParamSpec
from mlt.optim.base import OptimizerConfig, group_tree
from mlt.optim.schedule import Schedule

BATCH_AXES = ("layers", "experts", "branches")


class Muon(OptimizerConfig):
    """Five Newton-Schulz steps turn the momentum of each matrix into a nearly orthogonal update.

    Parameters of group "matrix" that read from or write to the residual stream are the matrices: their `embed` dim is one
    side, all others together the other; layers, experts and branches are separate matrices. Embeddings, tables, vectors and
    the rest are trained by AdamW at `adam_rate`.

    Attributes:
        learning_rate: peak rate of the matrices; an update has the root mean square `update_rms` before it.
        update_rms: 0.2 is that of a typical AdamW update (arXiv 2502.16982), so that rates carry over.
        beta: of the momentum.
        steps: Newton-Schulz steps.
        weight_decay: of the matrices, times the learning rate.
        adam_rate: learning rate of AdamW over that of the matrices.
        table_rate: learning rate of sparse tables over that of the rest of AdamW.
    """

    update_rms: float = 0.2
    beta: float = 0.95
    steps: int = 5
    weight_decay: float = 0.1
    adam_rate: float = 1.0
    table_rate: float = 5.0

    def problems(self) -> Iterator[Problem]:
        for name in ("learning_rate", "update_rms", "adam_rate"):
            if getattr(self, name) <= 0:
                yield Problem(name, getattr(self, name), "must be positive")
        if not 0 <= self.beta < 1:
            yield Problem("beta", self.beta, "must lie in [0, 1)")
        if self.steps < 1:
            yield Problem("steps", self.steps, "must be at least 1")
        for name in ("weight_decay", "table_rate"):
            if getattr(self, name) < 0:
                yield Problem(name, getattr(self, name), "must not be negative")

    def build(self, specs: Any, schedule: Schedule, steps: int) -> optax.GradientTransformation:
        sides = jax.tree.map(matrix_sides, specs)
        rates = group_tree(specs, {"table": self.table_rate}, 1.0)
        by_group = optax.stateless(lambda updates, _: jax.tree.map(lambda u, rate: u * rate, updates, rates))
        rate = schedule.build(self.learning_rate, steps)
        orthogonal = muon(
            rate,
            ns_steps=self.steps,
            beta=self.beta,
            weight_decay=self.weight_decay,
            adam_b2=0.95,
            adam_learning_rate=schedule.build(self.learning_rate * self.adam_rate, steps),
            muon_weight_dimension_numbers=lambda _: sides,  # a model is callable itself
            consistent_rms=self.update_rms,
        )
        return optax.chain(orthogonal, by_group)


def matrix_sides(spec: ParamSpec) -> MuonDimensionNumbers | None:
    """Which dims of a parameter are the rows and which the columns of its matrices; None if it has none."""
    if spec.group != "matrix":
        return None
    stream = [i for i, axis in enumerate(spec.axes) if axis == "embed"]
    others = [i for i, axis in enumerate(spec.axes) if axis not in ("embed", *BATCH_AXES)]
    if len(stream) != 1 or not others:
        return None
    rows, columns = (stream, others) if stream[0] < others[0] else (others, stream)
    return MuonDimensionNumbers(reduction_axis=tuple(rows), output_axis=tuple(columns))
