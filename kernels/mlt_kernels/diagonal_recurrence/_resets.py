"""Document boundaries: as marks of tokens, and as coefficients, where a reset is a factor of exact zero."""

import jax.numpy as jnp
from jax import Array

from mlt_kernels.segments import starts

Resets = tuple[Array, Array]
"""(token opens a document, token is padding), both (B, T) bool. Padding leaves the state as it is."""


def resets(segment_ids_BT: Array | None, reverse: bool) -> Resets | None:
    """Marks of a recurrence that runs from the last token to the first if `reverse`."""
    if segment_ids_BT is None:
        return None
    start_BT = starts(segment_ids_BT[:, ::-1])[:, ::-1] if reverse else starts(segment_ids_BT)
    return start_BT, segment_ids_BT == 0


def with_resets(a: Array, b: Array, segment_ids_BT: Array | None, reverse: bool) -> tuple[Array, Array]:
    """Coefficients (a, b) that give the packed recurrence without any segment ids."""
    marks = resets(segment_ids_BT, reverse)
    if marks is None:
        return a, b
    start, padding = (mark[(...,) + (None,) * (a.ndim - 2)] for mark in marks)
    a = jnp.where(start, jnp.zeros((), a.dtype), jnp.where(padding, jnp.ones((), a.dtype), a))
    return a, jnp.where(padding, jnp.zeros((), b.dtype), b)
