"""Scores under a vector decay, with no (C, C, K) array and no exponent above 0.

The C tokens of a chunk are N blocks of U = 8. Inside a block, pairs are decayed one by one, (U, U, K). Between a
query in block a and a key in an earlier block b the decay runs from the key to the end of b, over the blocks in
between, and from the start of a to the query: three factors of at most 1. With the first two on the keys, once for
every a, the scores between blocks are one batched matrix product.

Letters: Y rows and heads, N blocks (a of queries, b of keys), U tokens of a block, S queries stacked at a token,
C = N U tokens, K key dim.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

BLOCK = 8
HIGHEST = jax.lax.Precision.HIGHEST


class Factors(NamedTuple):
    """Decays between tokens of one chunk."""

    pairs: Array  # from key to query of a block, (Y, N, U query, U key, K); 0 unless the key is not after the query
    onto_query: Array  # from the block's start to the query, (Y, N, U, K)
    onto_key: Array  # from the key to the block's end, (Y, N, U, K)
    between: Array  # over the blocks between b and a, (Y, N a, N b, K); 0 unless b < a


def factors(g_YCK: Array) -> tuple[Factors, Array, Array]:
    """Decays of the pairs of tokens, then of each token since the chunk's start and until its end, (Y, C, K).

    Those across a document border mix documents: nothing may read them.
    """
    Y, C, K = g_YCK.shape
    U = min(BLOCK, C)
    N = C // U
    a, b = np.arange(U)[:, None], np.arange(U)
    g = g_YCK.reshape(Y, N, U, K)
    (pairs,) = _sums(g, _between(U, with_query=True))
    since, until = _sums(g, b <= a, b > a)
    pairs = jnp.exp(jnp.where((b <= a)[..., None], pairs.reshape(Y, N, U, U, K), -jnp.inf))
    a, b = np.arange(N)[:, None], np.arange(N)
    between, before, after = _sums(since[:, :, -1], _between(N, with_query=False), b < a, b > a)
    between = jnp.exp(jnp.where((b < a)[..., None], between.reshape(Y, N, N, K), -jnp.inf))
    into = jnp.exp(since + before[:, :, None]).reshape(Y, C, K)
    out = jnp.exp(until + after[:, :, None]).reshape(Y, C, K)
    return Factors(pairs, jnp.exp(since), jnp.exp(until), between), into, out


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def scores(x_YCSK: Array, k_YCK: Array, f: Factors, low: Any) -> Array:
    """(Y, C, S, C) scores x_i . k_j decayed from j to i, 0 where j > i. `low` is the dtype of matrix operands.

    The gradient is written out because XLA is slow, on a CPU by an order of magnitude, at the sums over broadcast
    dims that it would be made of.
    """
    Y, C, S, K = x_YCSK.shape
    N, U = f.onto_query.shape[1:3]
    x, k = x_YCSK.reshape(Y, N, U, S, K), k_YCK.reshape(Y, N, U, K)
    inside = _product(x, jnp.swapaxes(k[:, :, None] * f.pairs, -1, -2), low)
    queries, keys = _between_operands(x, k, f)
    outside = _product(queries, jnp.swapaxes(keys, -1, -2), low)
    own = np.eye(N, dtype=bool)[:, None, :, None]
    inside, outside = inside.reshape(Y, N, U * S, 1, U), outside.reshape(Y, N, U * S, N, U)
    return jnp.where(own, inside, outside).reshape(Y, C, S, C)


def _scores_fwd(x_YCSK: Array, k_YCK: Array, f: Factors, low: Any) -> tuple[Array, tuple[Array, Array, Factors]]:
    return scores(x_YCSK, k_YCK, f, low), (x_YCSK, k_YCK, f)


def _scores_bwd(low: Any, residuals: tuple[Array, Array, Factors], grad: Array) -> tuple[Array, Array, Factors]:
    x_YCSK, k_YCK, f = residuals
    Y, C, S, K = x_YCSK.shape
    N, U = f.onto_query.shape[1:3]
    x, k = x_YCSK.reshape(Y, N, U, S, K), k_YCK.reshape(Y, N, U, K)

    # Blocks on and above the diagonal meet zeros of `between` here.
    queries, keys = _between_operands(x, k, f)
    grad_rows = grad.reshape(Y, N, U * S, C)
    d_queries = _product(grad_rows, keys, low).reshape(Y, N, U, S, K)
    d_keys = _product(jnp.swapaxes(grad_rows, -1, -2), queries, low).reshape(Y, N, N, U, K)
    d_moved = jnp.sum(d_keys * f.between[:, :, :, None], axis=1)
    moved = k * f.onto_key
    d_between = jnp.sum(d_keys * moved[:, None], axis=3)

    tiles = grad.reshape(Y, N, U, S, N, U)
    own = jnp.stack([tiles[:, n, :, :, n] for n in range(N)], axis=1)
    d_x = _product(own, k[:, :, None] * f.pairs, low)
    d_decayed = sum(own[:, :, :, s, :, None] * x[:, :, :, s, None] for s in range(S))

    d_x = d_x + d_queries * f.onto_query[:, :, :, None]
    d_k = d_moved * f.onto_key + jnp.sum(d_decayed * f.pairs, axis=2)
    d_factors = Factors(
        pairs=d_decayed * k[:, :, None],
        onto_query=sum(d_queries[:, :, :, s] * x[:, :, :, s] for s in range(S)),
        onto_key=d_moved * k,
        between=d_between,
    )
    return d_x.reshape(x_YCSK.shape).astype(x_YCSK.dtype), d_k.reshape(k_YCK.shape).astype(k_YCK.dtype), d_factors


scores.defvjp(_scores_fwd, _scores_bwd)


def _between_operands(x: Array, k: Array, f: Factors) -> tuple[Array, Array]:
    Y, N, U, S, K = x.shape
    queries = (x * f.onto_query[:, :, :, None]).reshape(Y, N, U * S, K)
    keys = (k * f.onto_key)[:, None] * f.between[:, :, :, None]
    return queries, keys.reshape(Y, N, N * U, K)


def _product(a: Array, b: Array, low: Any) -> Array:
    wide = jnp.promote_types(low, jnp.float32)
    return jnp.matmul(a.astype(low), b.astype(low), precision=HIGHEST, preferred_element_type=wide)


def _between(units: int, *, with_query: bool) -> np.ndarray:
    """(units^2, units): the units after b up to a, with or without a itself."""
    a, b, c = np.arange(units)[:, None, None], np.arange(units)[:, None], np.arange(units)
    return ((b < c) & ((c <= a) if with_query else (c < a))).reshape(units * units, units)


def _sums(g: Array, *rows: np.ndarray) -> list[Array]:
    """Sums of g (..., units, K) over the units that each row of the (rows, units) tables names."""
    table = np.concatenate(rows).astype(g.dtype)
    table = jnp.broadcast_to(table, (*g.shape[:-2], *table.shape))
    sums = jnp.matmul(table, g, precision=HIGHEST)
    return jnp.split(sums, np.cumsum([len(r) for r in rows])[:-1], axis=-2)
