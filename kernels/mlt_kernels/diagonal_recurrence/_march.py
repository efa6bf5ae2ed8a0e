"""What kernels that walk along a row share: the loop over tokens with loads ahead, padding, and marks of tokens."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mlt_kernels.diagonal_recurrence._resets import resets

ORDINARY, START, PADDING = 0, 1, 2
"""Marks of a token: it goes on, it opens a document, it leaves the state as it is."""


def march(
    tokens: int,
    group: int,
    load: Callable[[Any], Any],
    step: Callable[[Any, Any, Any], Any],
    carry: Any,
    *,
    first: Any = 0,
    reverse: bool = False,
) -> Any:
    """carry = step(t, load(t), carry) for each of `tokens` tokens from `first` on, or from the last of them back.

    The loads of one group of tokens are given out before the steps of the group in front of it: a serial loop hides
    the latency of memory only so. `tokens` is a multiple of `group`.
    """
    groups = tokens // group

    def time(g: Any, k: int) -> Any:
        i = g * group + k
        return first + (tokens - 1 - i if reverse else i)

    def loads(g: Any) -> list[Any]:
        return [load(time(g, k)) for k in range(group)]

    def body(g: Array, state: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
        carry, loaded = state
        ahead = loads(jnp.minimum(g + 1, groups - 1))
        for k in range(group):
            carry = step(time(g, k), loaded[k], carry)
        return carry, ahead

    return jax.lax.fori_loop(0, groups, body, (carry, loads(0)))[0]


def marks(segment_ids_BT: Array | None, shape: tuple[int, int], padded: int, reverse: bool = False) -> Array:
    """(B, padded) int32 marks of the tokens of a row; tokens past its end are padding."""
    mark_BT = jnp.full(shape, ORDINARY, jnp.int32)
    found = resets(segment_ids_BT, reverse)
    if found is not None:
        start_BT, padding_BT = found
        mark_BT = jnp.where(padding_BT, PADDING, jnp.where(start_BT, START, ORDINARY)).astype(jnp.int32)
    return jnp.pad(mark_BT, [(0, 0), (0, padded - shape[1])], constant_values=PADDING)


def padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def pad(x: Array, sizes: dict[int, int]) -> Array:
    """x with zeros behind, so that dim d has sizes[d]; x itself where nothing is missing."""
    missing = [(0, sizes.get(d, size) - size) for d, size in enumerate(x.shape)]
    return jnp.pad(x, missing) if any(after for _, after in missing) else x
