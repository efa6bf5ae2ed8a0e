"""Blocks of `size` tokens that have ended, counted from the start of each document: what later tokens of it may look at.

A row of T tokens has at most T // size of them, wherever its documents start. Each takes a slot, in the order of their ends;
slots left over are empty. So blocks have a fixed shape, and none holds tokens of two documents.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mlt.mixers.blocks import ends
from mlt.parallel import sequence


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
    """Attributes:
    end: (B, J) int32, row index of each block's last token; T in an empty slot.
    segment: (B, J) int32, its document; 0 in an empty slot.
    number: (B, J) int32, its place in the document, from 0.
    """

    end: jax.Array
    segment: jax.Array
    number: jax.Array


def closed_blocks(segment_ids_BT: jax.Array, positions_BT: jax.Array, size: int) -> Blocks:
    """The blocks that end inside a row; one of them may have begun before it."""
    T = segment_ids_BT.shape[1]
    count = -(-T // size)
    index_BT = jnp.where(ends(segment_ids_BT, positions_BT, size), jnp.arange(T, dtype=jnp.int32), T)
    end_BJ = jnp.sort(index_BT, axis=1)[:, :count]
    at = lambda x: jnp.take_along_axis(x, jnp.minimum(end_BJ, T - 1), axis=1)  # noqa: E731
    taken_BJ = end_BJ < T
    return Blocks(end_BJ, jnp.where(taken_BJ, at(segment_ids_BT), 0), jnp.where(taken_BJ, at(positions_BT) // size, 0))


def at_ends(x: jax.Array, blocks: Blocks) -> jax.Array:
    """(B, J, ...): what (B, T, ...) holds at the last token of each block, zero in empty slots."""
    T = x.shape[1]
    index = jnp.minimum(blocks.end, T - 1).reshape(*blocks.end.shape, *[1] * (x.ndim - 2))
    taken = (blocks.end < T).reshape(index.shape)
    return jnp.where(taken, jnp.take_along_axis(x, index, axis=1), jnp.zeros((), x.dtype))


def members(blocks: Blocks, length: int, size: int) -> tuple[jax.Array, jax.Array]:
    """Row indices of each block's tokens (B, J, size), and whether the token is there: not in an empty slot or before the row."""
    index_BJC = blocks.end[..., None] - jnp.arange(size - 1, -1, -1, dtype=jnp.int32)
    there_BJC = (index_BJC >= 0) & (blocks.end < length)[..., None]
    return jnp.clip(index_BJC, 0, length - 1), there_BJC


def gather(x: jax.Array, index_BJC: jax.Array) -> jax.Array:
    """(B, J, C, ...): the tokens with these row indices of (B, T, ...)."""
    return jax.vmap(lambda row, index: row[index])(x, index_BJC)


def visible(blocks: Blocks, segment_ids_BT: jax.Array, number_BT: jax.Array) -> jax.Array:
    """(B, T, J) bool: the block is of the token's document, and comes before block `number_BT` of it."""
    same = (blocks.segment[:, None] == segment_ids_BT[..., None]) & (segment_ids_BT != 0)[..., None]
    return same & (blocks.number[:, None] < number_BT[..., None])


def front_of_shard(tokens: tuple[Any, ...], width: int, size: int) -> tuple[Any, ...]:
    """(B, T, ...) arrays (or None) of a sequence shard with the `width` tokens in front of it, the last array being positions.

    Blocks that end in front of the shard belong to the shard that they end on: no position there ends one.
    """
    longer = [x if x is None or x.ndim == 1 else sequence.with_front(x, width, size) for x in tokens[:-1]]
    positions = sequence.with_front(tokens[-1], width, size)
    return (*longer, jnp.where(jnp.arange(positions.shape[1]) < width, 0, positions))
