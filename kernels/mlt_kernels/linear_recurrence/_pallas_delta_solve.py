"""Delta rule on a GPU, the *solve* kernels: for each chunk the inverse of the unit triangular matrix of its writes.

With S_ij = beta_i k_i . k_j for j before i in the same document, the chunk's writes are (I + S . D)^-1 beta (V - reads), D
the decays from j to i. A scalar decay splits, D_ij = exp(G_i - G_j), so the inverse of I + S . D is that of I + S times D
element by element, which is what is stored. Its entries are at most beta in size, for keys of norm up to 1. A vector
decay stands inside the product k_i . k_j; its kernel gives the decayed scores of the queries too.

Blocks of 16: the diagonal ones are inverted by forward substitution, the others follow block by block,
T_ab = -T_aa (S_ab T_bb + ... + S_a,a-1 T_a-1,b), all in float32. The shorter product of (I + (-S)^(2^i)) is not usable: it
overflows where keys repeat.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from mlt_kernels.linear_recurrence._pallas_delta_chunk import INVERSE, LEAF, Plan, Refs, dot, grid, iota, masked_exp
from mlt_kernels.linear_recurrence._pallas_delta_parts import fine_dot, parts

Blocks = dict[tuple[int, int], Array]


def solve(plan: Plan, x: dict[str, Array]) -> dict[str, Array]:
    """The parts `INVERSE` (B, H, J, C, C) from k, beta, first and sums of decays; with a vector decay also `scores`, from q."""
    outputs = dict.fromkeys(INVERSE[: 1 if plan.refine else None], (plan.low, "square"))
    names = ["k", "beta", "first", *(("coarse", "fine") if plan.decay == "scalar" else ())]
    kernel = _scalar_kernel
    if plan.decay == "vector":
        names += ["q", "coarse", "fine"]
        outputs["scores"] = (jnp.float32, "square")
        if plan.refine:
            outputs["overlap"] = (jnp.float32, "square")
        kernel = _vector_kernel
    inputs = {name: x[name] for name in names}
    return plan.tile(functools.partial(kernel, plan=plan), inputs, outputs, heads=plan.H, warps=plan.solve_warps)


def _scalar_kernel(x: Refs, y: Refs, *, plan: Plan) -> None:
    N, width = plan.C // LEAF, min(plan.K, 64)
    overlap: Blocks = {(a, b): jnp.zeros((LEAF, LEAF), jnp.float32) for a in range(N) for b in range(a + 1)}
    for at in range(0, plan.K, width):
        keys = [x["k"][tokens(a), pl.ds(at, width)] for a in range(N)]
        for a, b in overlap:
            overlap[a, b] += dot(keys[a], keys[b], plan.low, (1, 1))
    _write_inverse(x, y, overlap, N, scalar_decays(x, N) if plan.decay == "scalar" else None)


def scalar_decays(x: Refs, N: int) -> Blocks:
    """Decays from key to query, any number from 0 to 1 where a document border lies between."""
    found: Blocks = {}
    for a in range(N):
        for b in range(a + 1):
            coarse, fine = (x[name][0, tokens(a)][:, None] - x[name][0, tokens(b)][None, :] for name in ("coarse", "fine"))
            found[a, b] = jnp.exp(jnp.minimum(coarse + fine, 0.0))
    return found


def _write_inverse(x: Refs, y: Refs, overlap: Blocks, N: int, decays: Blocks | None = None) -> None:
    """Stores the inverse made of k_i . k_j, decayed or not, times the decays if there are any."""
    strict: Blocks = {}
    for a, b in overlap:
        beta = x["beta"][0, tokens(a)][:, None]
        mask = block_meet(x["first"][tokens(a)], a, b) & (LEAF * b + grid(LEAF, 1) < LEAF * a + grid(LEAF, 0))
        strict[a, b] = jnp.where(mask, overlap[a, b] * beta, 0.0)
    inverse = _unit_inverse(strict, N)
    if decays is not None:
        inverse = {at: block * decays[at] for at, block in inverse.items()}
    names = [name for name in INVERSE if name in y]
    split = {at: parts(block, y["inverse"].dtype, len(names)) for at, block in inverse.items()}
    for n, name in enumerate(names):
        store_blocks(y[name], {at: blocks[n] for at, blocks in split.items()}, N)
    if "overlap" in y:
        store_blocks(y["overlap"], strict, N)


def tokens(a: int | Array) -> Any:
    """Rows of block a of a chunk."""
    return pl.ds(LEAF * a, LEAF)


def block_meet(first: Array, a: int | Array, b: int | Array) -> Array:
    """(16, 16) bool: the key in block b is not after the query in block a and in its document."""
    query, key = LEAF * a + grid(LEAF, 0), LEAF * b + grid(LEAF, 1)
    return (key <= query) & (key >= first[:, None])


def store_blocks(ref: Any, blocks: Blocks, N: int) -> None:
    """Writes a lower triangular matrix given by blocks, zeros above."""
    for a in range(N):
        for b in range(N):
            block = blocks.get((a, b), jnp.zeros((LEAF, LEAF), jnp.float32))
            ref[0, tokens(a), tokens(b)] = block.astype(ref.dtype)


def _unit_inverse(strict: Blocks, N: int) -> Blocks:
    """(I + S)^-1 by blocks, S strictly lower triangular."""
    leaves = tuple(strict[a, a] for a in range(N))

    def eliminate(j: Array, inverses: tuple[Array, ...]) -> tuple[Array, ...]:
        done = []
        for leaf, inverse in zip(leaves, inverses, strict=True):
            column = jnp.sum(jnp.where(grid(LEAF, 1) == j, leaf, 0.0), axis=1)
            row = jnp.sum(jnp.where(grid(LEAF, 0) == j, inverse, 0.0), axis=0)
            done.append(inverse - column[:, None] * row[None, :])
        return tuple(done)

    identity = jnp.where(grid(LEAF, 0) == grid(LEAF, 1), 1.0, 0.0)
    inverses = jax.lax.fori_loop(0, LEAF - 1, eliminate, (identity,) * N)
    inverse: Blocks = {(a, a): inverses[a] for a in range(N)}
    for b in range(N):
        for a in range(b + 1, N):
            moved = dot(strict[a, b], inverse[b, b])
            for c in range(b + 1, a):
                moved += dot(strict[a, c], inverse[c, b])
            inverse[a, b] = -dot(inverse[a, a], moved)
    return inverse


def _vector_kernel(x: Refs, y: Refs, *, plan: Plan) -> None:
    """Decays inside the products. Between blocks b < a by way of the first token of a, from where on they go onto the query
    and up to where onto the key: both exponents are at most 0. In a block pair by pair.
    """
    N, width = plan.C // LEAF, min(plan.K, 32)
    zero = jnp.zeros((LEAF, LEAF), jnp.float32)
    scores: Blocks = {(a, b): zero for a in range(N) for b in range(a + 1)}
    overlap: Blocks = dict(scores)
    for at in range(0, plan.K, width):
        columns = pl.ds(at, width)
        for a in range(N):
            sums_a = read_sums(x, tokens(a), columns)
            q, k = (x[name][tokens(a), columns].astype(jnp.float32) for name in ("q", "k"))
            first_token = read_sums(x, LEAF * a, columns)
            onto_query = decay(first_token, sums_a)
            for b in range(a):
                onto_key = decay(read_sums(x, tokens(b), columns), first_token)
                keys = x["k"][tokens(b), columns] * onto_key
                scores[a, b] += fine_dot(q * onto_query, keys, plan.low, (1, 1))
                overlap[a, b] += fine_dot(k * onto_query, keys, plan.low, (1, 1))

            def key(j: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
                one = x["k"][LEAF * a + j, columns].astype(jnp.float32)  # noqa: B023
                decayed = one * decay_since(j, read_sums(x, LEAF * a + j, columns), sums_a)  # noqa: B023
                by_q, by_k = (jnp.sum(queries * decayed, axis=1)[:, None] for queries in (q, k))  # noqa: B023
                here = grid(LEAF, 1) == j
                return found[0] + jnp.where(here, by_q, 0.0), found[1] + jnp.where(here, by_k, 0.0)

            scores[a, a], overlap[a, a] = jax.lax.fori_loop(0, LEAF, key, (scores[a, a], overlap[a, a]))
    for a, b in scores:
        scores[a, b] = jnp.where(block_meet(x["first"][tokens(a)], a, b), scores[a, b], 0.0)
    store_blocks(y["scores"], scores, N)
    _write_inverse(x, y, overlap, N)


def read_sums(x: Refs, at: Any, columns: Any) -> tuple[Array, Array]:
    """Sums of vector decays at a token (K,) or at some (16, K)."""
    return x["coarse"][at, 0, columns], x["fine"][at, 0, columns]


def decay(key: tuple[Array, Array], query: tuple[Array, Array]) -> Array:
    """exp of the log decays from key to query, one of them a block or both."""
    return jnp.exp((query[0] - key[0]) + (query[1] - key[1]))


def decay_since(j: Array, key: tuple[Array, Array], queries: tuple[Array, Array]) -> Array:
    """(16, K): from token j of a block to each of its tokens, 0 before j."""
    from_j = (iota(LEAF) >= j)[:, None]
    return masked_exp(from_j, (queries[0] - key[0][None, :]) + (queries[1] - key[1][None, :]))
