"""KDA on a GPU, what a vector decay adds to the backward pass: gradients by way of the pairs of a chunk.

The decay of a pair stands inside its product, one number for each key dim, so gradients of scores cannot go back by one
matrix product. One program takes a block c of 16 tokens: as queries against earlier blocks, as keys against later ones, both
by way of the query block's first token as in the solve kernel, and pair by pair inside itself. The decay of token t acts on
the pairs (i, j) with j < t <= i; its gradient is the sum of what they weigh, W_ij = (dA_ij q_i + dM_ij k_i) k_j decay_ij, over

    queries i >= t of the block with keys of earlier blocks,        keys j < t of the block with queries of later blocks,
    all pairs of a later with an earlier block,                     pairs of the block,

and no sum is a difference.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from mlt_kernels.linear_recurrence._pallas_delta_chunk import LEAF, Plan, Refs, count_dot, grid, iota
from mlt_kernels.linear_recurrence._pallas_delta_parts import fine_dot
from mlt_kernels.linear_recurrence._pallas_delta_solve import block_meet, decay, decay_since, read_sums, tokens


def within_chunks(plan: Plan, x: dict[str, Array]) -> dict[str, Array]:
    """d_q, d_k, d_beta, d_g from those by way of the state, and the gradients d_scores and d_overlap of the pairs."""
    names = ["q", "k", "beta", "first", "coarse", "fine", "d_scores", "d_overlap"]
    inputs = {name: x[name] for name in names} | {f"old_{name}": x[name] for name in ("d_q", "d_k", "d_beta", "d_g")}
    outputs: dict[str, tuple[Any, str]] = dict.fromkeys(("d_q", "d_k"), (x["q"].dtype, "vector"))
    outputs |= {"d_beta": (jnp.float32, "gate"), "d_g": (jnp.float32, "vector")}
    kernel = functools.partial(_block_kernel, plan=plan)
    return plan.tile(kernel, inputs, outputs, heads=plan.H, warps=plan.solve_warps, parts=plan.C // LEAF)


def from_state(plan: Plan, into_CK: Array, leave_CK: Array, survive_K: Array) -> Array:
    """(C, K) gradient of the decays from those of the logarithms of the factors on reads, writes and state."""
    key_before_CC = grid(plan.C, 1) < grid(plan.C, 0)
    query_from_CC = grid(plan.C, 1) >= grid(plan.C, 0)
    return count_dot(plan, query_from_CC, into_CK) + count_dot(plan, key_before_CC, leave_CK) + survive_K[None, :]


def _block_kernel(x: Refs, y: Refs, *, plan: Plan) -> None:
    c, width = pl.program_id(2), min(plan.K, 64)
    d_beta = x["old_d_beta"][0, tokens(c)]
    for at in range(0, plan.K, width):
        columns = pl.ds(at, width)
        d_q, d_k, d_g, more = _columns(plan, x, c, columns)
        d_beta += more
        for name, value in (("d_q", d_q), ("d_k", d_k), ("d_g", d_g)):
            total = x[f"old_{name}"][tokens(c), 0, columns] + value
            y[name][tokens(c), 0, columns] = total.astype(y[name].dtype)
    y["d_beta"][0, tokens(c)] = d_beta


def _columns(plan: Plan, x: Refs, c: Array, columns: Any) -> tuple[Array, Array, Array, Array]:
    """(16, columns) additions to d_q, d_k, d_g of block c and (16,) to its d_beta."""
    N, low = plan.C // LEAF, plan.low
    q, k = (x[name][tokens(c), columns].astype(jnp.float32) for name in ("q", "k"))
    beta = x["beta"][0, tokens(c)][:, None]
    sums = read_sums(x, tokens(c), columns)
    zero = jnp.zeros(q.shape, jnp.float32)

    def grads(a: Array, b: Array) -> tuple[Array, Array]:
        """Of the scores and of the overlaps of query block a and key block b, the second before beta."""
        mask = block_meet(x["first"][tokens(a)], a, b)
        before = LEAF * b + grid(LEAF, 1) < LEAF * a + grid(LEAF, 0)
        d_scores, d_overlap = (x[name][0, tokens(a), tokens(b)] for name in ("d_scores", "d_overlap"))
        return jnp.where(mask, d_scores, 0.0), jnp.where(mask & before, d_overlap, 0.0)

    def moved_keys(a: Array, b: Array) -> Array:
        """Keys of block b decayed up to the first token of block a."""
        onto = decay(read_sums(x, tokens(b), columns), read_sums(x, LEAF * a, columns))
        return x["k"][tokens(b), columns] * onto

    def moved_queries(a: Array) -> tuple[Array, Array]:
        """Queries, and keys times beta, of block a decayed from its first token on."""
        onto = decay(read_sums(x, LEAF * a, columns), read_sums(x, tokens(a), columns))
        beta_a = x["beta"][0, tokens(a)][:, None]
        return x["q"][tokens(a), columns] * onto, x["k"][tokens(a), columns] * onto * beta_a

    def from_keys(a: Array, b: Array) -> tuple[Array, Array]:
        d_scores, d_overlap = grads(a, b)
        keys = moved_keys(a, b)
        return fine_dot(d_scores, keys, low), fine_dot(d_overlap, keys, low)

    def earlier(b: Array, total: tuple[Array, Array]) -> tuple[Array, Array]:
        d_q, d_k = from_keys(c, b)
        return total[0] + d_q, total[1] + d_k

    onto = decay(read_sums(x, LEAF * c, columns), sums)
    d_q, d_by_beta = (part * onto for part in jax.lax.fori_loop(0, c, earlier, (zero, zero)))

    def later(a: Array, total: tuple[Array, Array]) -> tuple[Array, Array]:
        d_k, across = total
        d_scores, d_overlap = grads(a, c)
        queries, keys = moved_queries(a)
        by_key = fine_dot(d_scores, queries, low, (0, 0)) + fine_dot(d_overlap, keys, low, (0, 0))

        def pass_over(b: Array, across: Array) -> Array:
            by_query, by_write = from_keys(a, b)
            return across + jnp.sum(queries * by_query + keys * by_write, axis=0)

        d_k += by_key * decay(sums, read_sums(x, LEAF * a, columns))
        return d_k, jax.lax.fori_loop(0, c, pass_over, across)

    across = jnp.zeros((q.shape[1],), jnp.float32)
    d_k, across = jax.lax.fori_loop(c + 1, N, later, (zero, across))

    as_query, as_key = q * d_q + beta * k * d_by_beta, k * d_k
    d_scores, d_overlap = grads(c, c)
    place = iota(LEAF)[:, None]

    def token(t: Array, total: tuple[Array, ...]) -> tuple[Array, ...]:
        """Sums up the gradient of token t's decay, then adds the pairs with t as key, which the later tokens' decays act on."""
        d_q, d_by_beta, d_k, d_g, pairs = total
        here = jnp.sum(jnp.where(place < t, as_key, pairs), axis=0)
        d_g = jnp.where(place == t, here[None, :], d_g)
        from_t = decay_since(t, read_sums(x, LEAF * c + t, columns), sums)
        key = x["k"][LEAF * c + t, columns].astype(jnp.float32)[None, :]
        by_score, by_overlap = (jnp.sum(jnp.where(grid(LEAF, 1) == t, m, 0.0), axis=1)[:, None] for m in (d_scores, d_overlap))
        d_q += by_score * from_t * key
        d_by_beta += by_overlap * from_t * key
        by_key = (by_score * q + beta * by_overlap * k) * from_t
        d_k += jnp.where(place == t, jnp.sum(by_key, axis=0)[None, :], 0.0)
        return d_q, d_by_beta, d_k, d_g, pairs + by_key * key

    start = (d_q, d_by_beta, d_k, zero, as_query)
    d_q, d_by_beta, d_k, d_g, _ = jax.lax.fori_loop(0, LEAF, token, start)
    return d_q, d_k + beta * d_by_beta, d_g + across[None, :], jnp.sum(k * d_by_beta, axis=1)
