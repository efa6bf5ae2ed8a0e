"""Pairs of a chunk under one decay a head and key dim, for the TPU kernels: log2(C) levels of products of whole tiles.

A pair of tokens belongs to the smallest block of 2, 4, .. C tokens that holds both, the query in its right half and the key in
its left. It decays from the key to the end of the left half and on to the query: both factors are at most 1, so a level is
one product of a (C, K) tile with another, of which a mask keeps the pairs of that level. The sums of decays double from level
to level and are never differences, so a strong decay takes no digits from the mild ones. What decays feel goes the same way
back: a decay's gradient is the sum over the pairs, reads and writes that it lies between, never a difference of larger sums.

Letters: C tokens of a chunk, K key dim.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mlt_kernels.linear_recurrence._pallas_tpu_tools import ROWS

Product = Callable[..., Array]
"""`fine_dot` or `low_dot` of `_pallas_delta_parts`."""


class Level(NamedTuple):
    """Sums of log decays (C, K) inside the blocks of `size` tokens."""

    size: int
    before: Array  # over the tokens of the block up to this one
    after: Array  # over those behind it


def levels(g: Array) -> list[Level]:
    """Levels with blocks of 1, 2, .. C tokens; the last, all of the chunk, has no pairs of its own."""
    C = g.shape[0]
    found = [Level(1, g, jnp.zeros_like(g))]
    while found[-1].size < C:
        size, before, after = found[-1]
        right = _right(C, size)
        left_sum, right_sum = _row_of_blocks(before, size, size - 1), _row_of_blocks(before, size, 2 * size - 1)
        before, after = before + jnp.where(right, left_sum, 0.0), after + jnp.where(right, 0.0, right_sum)
        found.append(Level(2 * size, before, after))
    return found


def products(sides: Sequence[Array], k: Array, by: Sequence[Level], product: Product) -> list[Array]:
    """(C, C) x_i . k_j decayed from j to i, for each x (C, K) of `sides`; 0 unless j < i."""
    C = k.shape[0]
    found = [jnp.zeros((C, C), jnp.float32)] * len(sides)
    for level in by[:-1]:
        onto_query, keys = jnp.exp(level.before), k * jnp.exp(level.after)
        here = _pairs(C, level.size)
        for n, x in enumerate(sides):
            found[n] += jnp.where(here, product(x * onto_query, keys, k.dtype, (1, 1)), 0.0)
    return found


def gradients(
    sides: Sequence[Array],
    d_products: Sequence[Array],
    k: Array,
    by: Sequence[Level],
    d_before: Array,
    d_after: Array,
    product: Product,
) -> tuple[list[Array], Array, Array]:
    """Gradients of the sides, of k and of the log decays, all (C, K) float32.

    Args:
      d_products: (C, C), of each of `products`.
      d_before, d_after: (C, K), of the sums over the whole chunk.
    """
    C, low = k.shape[0], k.dtype
    d_sides = [jnp.zeros(k.shape, jnp.float32)] * len(sides)
    d_k = jnp.zeros(k.shape, jnp.float32)
    place = jax.lax.broadcasted_iota(jnp.int32, (C, 1), 0)
    for level in reversed(by[:-1]):
        size, right = level.size, _right(C, level.size)
        left_sum = _sum_of_blocks(jnp.where(right, d_before, 0.0), size)
        right_sum = _sum_of_blocks(jnp.where(right, 0.0, d_after), size)
        within = place & (2 * size - 1)
        d_before += jnp.where(within == size - 1, left_sum, 0.0) + jnp.where(within == 2 * size - 1, right_sum, 0.0)
        onto_query, onto_key = jnp.exp(level.before), jnp.exp(level.after)
        keys, here = k * onto_key, _pairs(C, size)
        for n, (x, d_product) in enumerate(zip(sides, d_products, strict=True)):
            d = jnp.where(here, d_product, 0.0)
            of_x = onto_query * product(d, keys, low)
            of_k = onto_key * product(d, x * onto_query, low, (0, 0))
            d_sides[n] += of_x
            d_k += of_k
            d_before += x * of_x
            d_after += k * of_k
    return d_sides, d_k, d_before


def _right(C: int, size: int) -> Array:
    """(C, 1): in the right half of its block of 2 size tokens."""
    return (jax.lax.broadcasted_iota(jnp.int32, (C, 1), 0) & size) != 0


def _pairs(C: int, size: int) -> Array:
    """(C, C): query i in the right half and key j in the left half of one block of 2 size tokens."""
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (C, C), n) for n in (0, 1))
    return (j < i) & ((i ^ j) >= size) & ((i ^ j) < 2 * size)


def _blocks(x: Array, size: int) -> tuple[Array, Array, int]:
    """x by blocks of 2 size tokens, or by tiles of 8 that hold several; the place of a token in its part; blocks of a part."""
    length = max(2 * size, ROWS)
    parts = x.reshape(x.shape[0] // length, length, x.shape[1])
    return parts, jax.lax.broadcasted_iota(jnp.int32, parts.shape, 1), length // (2 * size)


def _row_of_blocks(x: Array, size: int, row: int) -> Array:
    """(C, K): one row of each block of 2 size tokens, at all its tokens."""
    parts, place, number = _blocks(x, size)
    found = jnp.broadcast_to(parts[:, row : row + 1], parts.shape)
    for n in range(1, number):
        at = 2 * size * n
        found = jnp.where(place >= at, parts[:, at + row : at + row + 1], found)
    return found.reshape(x.shape)


def _sum_of_blocks(x: Array, size: int) -> Array:
    """(C, K): the sum over each block of 2 size tokens, at all its tokens."""
    parts, place, number = _blocks(x, size)
    if number == 1:
        return jnp.broadcast_to(jnp.sum(parts, axis=1, keepdims=True), parts.shape).reshape(x.shape)
    found: Any = jnp.zeros_like(parts)
    for n in range(number):
        here = (place >= 2 * size * n) & (place < 2 * size * (n + 1))
        found = jnp.where(here, jnp.sum(jnp.where(here, parts, 0.0), axis=1, keepdims=True), found)
    return found.reshape(x.shape)
