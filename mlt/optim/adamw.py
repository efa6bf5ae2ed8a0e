"""AdamW (arXiv 1711.05101) with parameter groups."""

from collections.abc import Iterator
from typing import Any

import jax
import optax

from mlt.config.problems import Problem
from mlt.optim.base import OptimizerConfig, group_tree
from mlt.optim.schedule import Schedule


class AdamW(OptimizerConfig):
    """Adam with decoupled weight decay.

    Norm scales, gates, decays and biases (group "vector") and sparse tables are never decayed. Tables have a learning
    rate of their own, as every published recipe for them asks (Engram, arXiv 2601.07372: 5x).

    Attributes:
        learning_rate: peak rate.
        beta1: of the first moment.
        beta2: of the second moment.
        eps: added to the root of the second moment.
        weight_decay: of matrices and embeddings, times the learning rate.
        table_rate: learning rate of sparse tables over that of the rest.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    table_rate: float = 5.0

    def problems(self) -> Iterator[Problem]:
        if self.learning_rate <= 0:
            yield Problem("learning_rate", self.learning_rate, "must be positive")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                yield Problem(name, getattr(self, name), "must lie in [0, 1)")
        for name in ("eps", "weight_decay", "table_rate"):
            if getattr(self, name) < 0:
                yield Problem(name, getattr(self, name), "must not be negative")

    def build(self, specs: Any, schedule: Schedule, steps: int) -> optax.GradientTransformation:
        decayed = group_tree(specs, {"matrix": True, "embedding": True}, False)
        rates = group_tree(specs, {"table": self.table_rate}, 1.0)
        by_group = optax.stateless(lambda updates, _: jax.tree.map(lambda u, rate: u * rate, updates, rates))
        return optax.chain(
            optax.scale_by_adam(self.beta1, self.beta2, self.eps),
            optax.add_decayed_weights(self.weight_decay, mask=decayed),
            by_group,
            optax.scale_by_learning_rate(schedule.build(self.learning_rate, steps)),
        )
