"""Keys whose score is a small bilinear form of two short lists (UltraMem, arXiv 2411.12364; V2, arXiv 2508.18756).

Letters: T tokens, H heads, R Tucker rank, N keys of each axis, K cells kept, C cores.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mlt.mixers.base import BuildInfo
from mlt.nn.linear import Linear
from mlt.nn.norm import layer_normalize
from mlt.nn.param import Buffer, buffer, constant, normal, param, uniform, zeros
from mlt.parallel.local import local
from mlt.parallel.rules import Rules

EPS = 1e-6
CELLS_AT_ONCE = 2**22
NORM_POWER = -0.4
CHOICE = ("batch", "seq", None, None)
SCORES = ("batch", "seq", None, None, None)


class TuckerKeys(nnx.Module):
    """Cell (i, j) of an N x N grid scores row_i^T (sum of cores) column_j, with R numbers for each row and column.

    The cells are found in two steps, which define the result: with the cores' best approximation of rank one, u v^T, keep
    the K rows of largest u . row_i and the K columns of largest v . column_j, then the K best cells of that small grid.
    u and v depend on the cores alone; of the two signs that they may have together, the one near that of the step before
    is taken, at first the one with a positive sum. `factors` remembers it.

    Args:
        num_keys: keys of each axis (N).
        num_heads: heads, each with queries, keys and cores of its own (H).
        key_dim: width of a key.
        rank: numbers that each row and column scores (R).
        num_cores: cores, each with a weight of its own for the cells found (C).
    """

    def __init__(self, info: BuildInfo, *, num_keys: int, num_heads: int, key_dim: int, rank: int, num_cores: int):
        std = normal(key_dim**-0.5)
        queries = (("heads", num_heads), (None, 2 * rank), ("head_dim", key_dim))
        self.rank = rank
        self.query = Linear((("embed", info.d_model),), queries, init=std)
        self.keys = param(
            (2, num_heads, rank, num_keys, key_dim), (None, "heads", None, None, "head_dim"), std, group="embedding"
        )
        self.query_scale = param((key_dim,), (None,), constant(key_dim**NORM_POWER), group="vector")
        self.key_scale = param((key_dim,), (None,), constant(key_dim**NORM_POWER), group="vector")
        cores = (num_heads, num_cores, rank, rank)
        self.cores = param(cores, (None,) * 4, uniform(0.0, 1.0), group="vector")
        self.factors: Buffer = buffer((num_heads, 2, rank), (None,) * 3, zeros)

    def __call__(self, x_BTD: jax.Array, rules: Rules, num_selected: int) -> "Cells":
        """The cells that each head reads."""
        scores = rules.constrain(self._scores(x_BTD), (None, *SCORES))
        factors_H2R = self.leading_factors()
        cores_HRR = self.cores[...].sum(1)
        find = local(
            functools.partial(find_cells, num_selected=num_selected),
            rules,
            (SCORES, SCORES, (None,) * 3, (None,) * 3),
            (CHOICE, CHOICE),
        )
        rows, columns = find(*(jax.lax.stop_gradient(x) for x in (scores[0], scores[1], cores_HRR, factors_H2R)))
        picked = [_pick(score, at) for score, at in ((scores[0], rows), (scores[1], columns))]
        weights = jnp.einsum("bthrk,hcrs,bthsk->bthkc", picked[0], self.cores[...], picked[1])
        projected = jnp.einsum("sbthrn,hsr->sbthn", scores, factors_H2R)
        return Cells(rows, columns, weights, projected)

    def leading_factors(self) -> jax.Array:
        """First singular vectors u and v of the summed cores of each head, (H, 2, R); no gradient passes."""
        left, _, right = jnp.linalg.svd(jax.lax.stop_gradient(self.cores[...]).sum(1))
        return aligned(jnp.stack([left[:, :, 0], right[:, 0, :]], axis=1), self.factors[...])

    def remembered(self) -> "TuckerKeys":
        """These keys with the signs of the present cores' factors remembered."""
        new = jax.tree.map(lambda leaf: leaf, self)
        new.factors = self.factors.replace(self.leading_factors())
        return new

    def _scores(self, x_BTD):
        """Scores of every row and every column, (2, B, T, H, R, N) float32."""
        q = self.query(x_BTD)
        q = q.reshape(*q.shape[:3], 2, self.rank, q.shape[-1])
        q = layer_normalize(q, eps=EPS) * self.query_scale[...]
        keys = layer_normalize(self.keys[...], eps=EPS) * self.key_scale[...]
        return jnp.einsum("bthsrk,shrnk->sbthrn", q, keys, precision=jax.lax.Precision.HIGHEST)


class Cells:
    """What `TuckerKeys` finds.

    Attributes:
        rows, columns: (B, T, H, K) int32 places of the cells, best first.
        weights: (B, T, H, K, C) float32 scores of the cells by each core.
        projected: (2, B, T, H, N) float32 u . row_i and v . column_j of every row and column, for balance losses.
    """

    def __init__(self, rows: jax.Array, columns: jax.Array, weights: jax.Array, projected: jax.Array):
        self.rows, self.columns, self.weights, self.projected = rows, columns, weights, projected


def aligned(factors_H2R: jax.Array, before_H2R: jax.Array) -> jax.Array:
    """`factors` with the joint sign of u and v that is nearer to `before`; where that is zero, the one with sum(u) > 0."""
    distance = lambda sign: jnp.abs(sign * factors_H2R - before_H2R).sum((1, 2))  # noqa: E731
    is_first = jnp.abs(before_H2R).sum((1, 2)) == 0
    flip = jnp.where(is_first, factors_H2R[:, 0].sum(-1) < 0, distance(-1.0) < distance(1.0))
    return jnp.where(flip[:, None, None], -factors_H2R, factors_H2R)


def find_cells(
    rows: jax.Array, columns: jax.Array, cores_HRR: jax.Array, factors_H2R: jax.Array, *, num_selected: int
) -> tuple[jax.Array, jax.Array]:
    """Row and column of the cells that each head reads, best first: two (B, T, H, K) int32.

    Args:
        rows, columns: (B, T, H, R, N) scores.
        cores_HRR: summed cores.
        factors_H2R: u and v.
        num_selected: K, at most N.
    """
    *lead, R, N = rows.shape
    tokens = lead[0] * lead[1]

    def block(pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        row, column = pair
        kept_row = jax.lax.top_k(jnp.einsum("thrn,hr->thn", row, factors_H2R[:, 0]), num_selected)[1]
        kept_column = jax.lax.top_k(jnp.einsum("thrn,hr->thn", column, factors_H2R[:, 1]), num_selected)[1]
        grid = jnp.einsum("thra,hrs,thsb->thab", _pick(row, kept_row), cores_HRR, _pick(column, kept_column))
        best = jax.lax.top_k(grid.reshape(*grid.shape[:2], -1), num_selected)[1]
        take = functools.partial(jnp.take_along_axis, axis=-1)
        return take(kept_row, best // num_selected), take(kept_column, best % num_selected)

    flat = tuple(x.reshape(tokens, lead[2], R, N) for x in (rows, columns))
    # The small grids of all tokens at once would be the largest array of the model.
    size = max(1, CELLS_AT_ONCE // (lead[2] * num_selected**2))
    found = block(flat) if tokens <= size else jax.lax.map(lambda one: _squeezed(block, one), flat, batch_size=size)
    return tuple(x.reshape(*lead, num_selected) for x in found)


def _squeezed(block: Any, one: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
    return tuple(x[0] for x in block(tuple(x[None] for x in one)))


def _pick(scores: jax.Array, at: jax.Array) -> jax.Array:
    """scores (..., R, N) at (..., K): (..., R, K)."""
    return jnp.take_along_axis(scores, at[..., None, :], axis=-1)
