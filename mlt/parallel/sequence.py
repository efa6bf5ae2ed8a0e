"""A sequence over the devices of the `context` axis: who is next to whom, and where documents go on.

These functions run inside `shard_map` (`parallel/local.py`). Shard d holds tokens d T to (d + 1) T - 1 of every row. A
document is a contiguous run of one segment id; 0 is padding, which nothing goes on from.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

AXIS = "context"


def shift(tree: Any, steps: int, size: int) -> Any:
    """What the shard `steps` to the left holds (to the right if negative); zeros where there is none.

    One collective-permute of each array of the tree.
    """
    moves = [(d, d + steps) for d in range(size) if 0 <= d + steps < size]
    return jax.tree.map(functools.partial(jax.lax.ppermute, axis_name=AXIS, perm=moves), tree)


def index() -> Array:
    return jax.lax.axis_index(AXIS)


def offset(length: int) -> Array:
    """Row index of the shard's first token, for shards of `length` tokens."""
    return index() * length


def segments_of(x: Array, segment_ids_BT: Array | None) -> Array:
    """Segment ids of (B, T, ...) rows, one document each where none are given."""
    return jnp.ones(x.shape[:2], jnp.int32) if segment_ids_BT is None else segment_ids_BT


def goes_on(segment_ids_BT: Array, size: int) -> Array:
    """(B,) bool: the document of the shard's last token goes on in the next shard."""
    following_B = shift(segment_ids_BT[:, 0], -1, size)
    last_B = segment_ids_BT[:, -1]
    return (last_B != 0) & (last_B == following_B)


def one_document(segment_ids_BT: Array) -> Array:
    """(B,) bool: the shard lies inside one document."""
    return (segment_ids_BT[:, 0] != 0) & (segment_ids_BT[:, 0] == segment_ids_BT[:, -1])


def left_context(x: Array, segment_ids_BT: Array, width: int, size: int) -> Array:
    """The `width` inputs in front of the shard (B, width, ...), zero where they are not of token 0's document.

    They move from as many shards to the left as hold them, and nothing else moves.
    """
    taken, before = _front(x, width, size), _front(segment_ids_BT, width, size)
    first_B1 = segment_ids_BT[:, :1]
    keep = (before == first_B1) & (first_B1 != 0)
    return jnp.where(keep.reshape(*keep.shape, *[1] * (x.ndim - 2)), taken, jnp.zeros((), x.dtype))


def with_front(tree: Any, width: int, size: int) -> Any:
    """Every (B, T, ...) array of the tree with the `width` tokens in front of the shard; zeros before the row."""
    return jax.tree.map(lambda x: jnp.concatenate([_front(x, width, size), x], axis=1), tree)


def _front(x: Array, width: int, size: int) -> Array:
    length = x.shape[1]
    pieces, hop = [], 1
    while width > 0:
        part = min(width, length)
        # Beyond the first shard there is nothing, whatever the width.
        piece = x[:, length - part :]
        pieces.insert(0, shift(piece, hop, size) if hop < size else jnp.zeros_like(piece))
        width, hop = width - part, hop + 1
    return jnp.concatenate(pieces, axis=1) if pieces else x[:, :0]
