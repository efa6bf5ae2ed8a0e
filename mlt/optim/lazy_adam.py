"""Adam on the rows that a step reads: exact where every row is, and no work for the others."""

from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp

from mlt.config.problems import Problem
from mlt.optim.table import Slots, TableOptimizer


class LazyAdam(TableOptimizer):
    """Adam (arXiv 1412.6980) of touched rows; the moments of the others do not decay either.

    A row that is read every c-th step hence forgets c times more slowly than under dense Adam. On steps that read every row
    the two are the same.

    Attributes:
        beta1, beta2, eps: of Adam.
        correction: steps that the bias correction counts: those of the "run", as SparseAdam of PyTorch does, or those that
            read the "row", which makes the first step of a row as long as that of any other; it costs a number a row.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    correction: Literal["run", "row"] = "run"

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                yield Problem(name, getattr(self, name), "must lie in [0, 1)")
        if self.eps < 0:
            yield Problem("eps", self.eps, "must not be negative")

    def slots(self) -> dict[str, bool]:
        return {"first": True, "second": True} | ({"read": False} if self.correction == "row" else {})

    def step(self, slots: Slots, grad_RV: jax.Array, count: jax.Array) -> tuple[jax.Array, Slots]:
        new = {
            "first": self.beta1 * slots["first"] + (1 - self.beta1) * grad_RV,
            "second": self.beta2 * slots["second"] + (1 - self.beta2) * jnp.square(grad_RV),
        }
        steps = jnp.asarray(count, jnp.float32)
        if self.correction == "row":
            new["read"] = slots["read"] + 1
            steps = new["read"][..., None]
        first = new["first"] / (1 - self.beta1**steps)
        second = new["second"] / (1 - self.beta2**steps)
        return first / (jnp.sqrt(second) + self.eps), new
