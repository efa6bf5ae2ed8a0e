"""Adagrad with one number a row: the least state that still gives each row a rate of its own."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from mlt.config.problems import Problem
from mlt.optim.table import Slots, TableOptimizer


class RowwiseAdagrad(TableOptimizer):
    """a += mean(g^2); row -= rate * g / (sqrt(a) + eps), as in FBGEMM and DLRM (arXiv 1906.00091).

    A row without gradient would not move under the dense rule either, so this is the dense rule.

    Attributes:
        eps: added to the root.
    """

    eps: float = 1e-8

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.eps < 0:
            yield Problem("eps", self.eps, "must not be negative")

    def slots(self) -> dict[str, bool]:
        return {"squares": False}

    def step(self, slots: Slots, grad_RV: jax.Array, count: jax.Array) -> tuple[jax.Array, Slots]:
        squares = slots["squares"] + jnp.mean(jnp.square(grad_RV), axis=-1)
        return grad_RV / (jnp.sqrt(squares)[..., None] + self.eps), {"squares": squares}
