"""Momentum with rows and columns of the update balanced: one moment a value, as DeepSeek-V4.1 trains its tables."""

from collections.abc import Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp

from mlt.config.problems import Problem
from mlt.optim.table import Slots, TableOptimizer


class SinkhornMomentum(TableOptimizer):
    """Nesterov momentum, then Sinkhorn balancing of a table's whole update.

        m <- beta m + (1 - beta) g        u = beta m + (1 - beta) g
        rows of u whose norm is at most tau times the mean norm of all rows become 0
        u <- u with rows, then columns, then rows, ... divided by their norm + eps, `iterations` times in all
        row -= rate * learning rate * scale * sqrt(V) * u

    so every row that moves at all moves by the same root mean square, `scale`, and columns share it nearly evenly. This is
    algorithm 1 of the DeepSeek-V4.1 report as public ports of it state it (beta 0.95, 11 iterations, tau 1e-3, eps 1e-20,
    scale 0.18, five times the rate, no decay), and DeepSeek's own kernels have its recursion; normalizing rows and columns
    in turn is SR-Sinkhorn of arXiv 2502.06742. The report also trains token embedding and head with it; here it is for
    tables.

    Balancing needs every row of a step at once, so the gradient is dense. A scanned period's tables are balanced one by one,
    and rows that only fill a table up count as rows without gradient.

    Attributes:
        beta: of the momentum.
        iterations: divisions of rows and columns together; odd, so that rows are divided last.
        tau: share of the mean norm up to which a row stays as it is.
        eps: added to norms.
        scale: root mean square of a row's update before the rate.
    """

    lazy: ClassVar[bool] = False

    beta: float = 0.95
    iterations: int = 11
    tau: float = 1e-3
    eps: float = 1e-20
    scale: float = 0.18

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if not 0 <= self.beta < 1:
            yield Problem("beta", self.beta, "must lie in [0, 1)")
        if self.iterations < 1 or self.iterations % 2 == 0:
            yield Problem("iterations", self.iterations, "must be odd: rows are divided first and last")
        for name in ("tau", "eps"):
            if getattr(self, name) < 0:
                yield Problem(name, getattr(self, name), "must not be negative")
        if self.scale <= 0:
            yield Problem("scale", self.scale, "must be positive")

    def slots(self) -> dict[str, bool]:
        return {"momentum": True}

    def step(self, slots: Slots, grad_RV: jax.Array, count: jax.Array) -> tuple[jax.Array, Slots]:
        """The direction of whole tables, (M, V) or stacked (L, M, V)."""
        del count
        momentum = self.beta * slots["momentum"] + (1 - self.beta) * grad_RV
        ahead = self.beta * momentum + (1 - self.beta) * grad_RV
        return self.scale * ahead.shape[-1] ** 0.5 * self.balanced(ahead), {"momentum": momentum}

    def balanced(self, update_MV: jax.Array) -> jax.Array:
        """The update (..., M, V) with rows of norm 1, or 0, and columns of nearly equal norms; float32."""
        norm_M1 = jnp.sqrt(jnp.square(update_MV).sum(-1, keepdims=True))
        # Factors of rows and columns are what is iterated: nothing of a table's size is made but the result.
        rows_M1 = (norm_M1 > self.tau * norm_M1.mean(-2, keepdims=True)).astype(jnp.float32)
        columns_1V = jnp.ones((*update_MV.shape[:-2], 1, update_MV.shape[-1]), jnp.float32)
        for turn in range(self.iterations):
            squares = jnp.square(update_MV * rows_M1 * columns_1V)
            if turn % 2 == 0:
                rows_M1 = rows_M1 / self._divisor(squares.sum(-1, keepdims=True))
            else:
                columns_1V = columns_1V / self._divisor(squares.sum(-2, keepdims=True))
        return update_MV * rows_M1 * columns_1V

    def _divisor(self, squares: jax.Array) -> jax.Array:
        """Norms + eps; 1 for a row or column of zeros, as compilers join divisions, and eps * eps is 0 in float32."""
        return jnp.where(squares > 0, jnp.sqrt(squares) + self.eps, 1.0)
