"""Adafactor (arXiv 1804.04235): the second moment of a matrix kept as its row and column means."""

from collections.abc import Iterator
from typing import Any

import jax
import optax

from mlt.config.problems import Problem
from mlt.optim.base import OptimizerConfig, group_tree
from mlt.optim.schedule import Schedule


class Adafactor(OptimizerConfig):
    """Adam's scaling with a factored second moment, update clipping and no first moment: almost no optimizer memory.

    Attributes:
        decay_rate: the second moment forgets at 1 - step^-decay_rate.
        clipping: updates with a larger root mean square are scaled down to it.
        min_dim: parameters whose two largest dims are smaller keep a full second moment.
        weight_decay: of matrices and embeddings, times the learning rate.
        table_rate: learning rate of sparse tables over that of the rest.
    """

    decay_rate: float = 0.8
    clipping: float = 1.0
    min_dim: int = 128
    weight_decay: float = 0.1
    table_rate: float = 5.0

    def problems(self) -> Iterator[Problem]:
        for name in ("learning_rate", "decay_rate", "clipping"):
            if getattr(self, name) <= 0:
                yield Problem(name, getattr(self, name), "must be positive")
        if self.min_dim < 1:
            yield Problem("min_dim", self.min_dim, "must be at least 1")
        for name in ("weight_decay", "table_rate"):
            if getattr(self, name) < 0:
                yield Problem(name, getattr(self, name), "must not be negative")

    def build(self, specs: Any, schedule: Schedule, steps: int) -> optax.GradientTransformation:
        decayed = group_tree(specs, {"matrix": True, "embedding": True}, False)
        rates = group_tree(specs, {"table": self.table_rate}, 1.0)
        by_group = optax.stateless(lambda updates, _: jax.tree.map(lambda u, rate: u * rate, updates, rates))
        return optax.chain(
            optax.scale_by_factored_rms(decay_rate=self.decay_rate, min_dim_size_to_factor=self.min_dim),
            optax.clip_by_block_rms(self.clipping),
            optax.add_decayed_weights(self.weight_decay, mask=decayed),
            by_group,
            optax.scale_by_learning_rate(schedule.build(self.learning_rate, steps)),
        )
