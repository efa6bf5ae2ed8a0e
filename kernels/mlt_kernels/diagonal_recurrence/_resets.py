"""Document boundaries as coefficients: a reset is a factor of exact zero, padding is a factor of one and no write."""

import jax.numpy as jnp
from jax import Array

from mlt_kernels.segments import starts


def with_resets(a: Array, b: Array, segment_ids_BT: Array | None, reverse: bool) -> tuple[Array, Array]:
    """Coefficients (a, b) that give the packed recurrence without any segment ids."""
    if segment_ids_BT is None:
        return a, b
    order = segment_ids_BT[:, ::-1] if reverse else segment_ids_BT
    start_BT = starts(order)[:, ::-1] if reverse else starts(order)
    lift = (...,) + (None,) * (a.ndim - 2)
    start, padding = start_BT[lift], (segment_ids_BT == 0)[lift]
    a = jnp.where(start, jnp.zeros((), a.dtype), jnp.where(padding, jnp.ones((), a.dtype), a))
    return a, jnp.where(padding, jnp.zeros((), b.dtype), b)
