"""tokamax's ragged product on Hopper GPUs (Mosaic GPU), rows read where they stand; its backward pass has no Blackwell form.

It leaves the rows of no group unwritten, in the result and in the gradient of lhs; selects make them zeros. Rows are filled up
to whole tiles, as rows of no group.

Status: checked through tokamax's own portable form of the same call, programs lowered for cuda; not run on a GPU.
"""

import jax.numpy as jnp
from jax import Array

from mlt_kernels import tokamax_calls

TILE, ROW = 64, 8
"""Numbers in a tile, and in the 16 bytes that a row must be whole multiples of for the copies of a Hopper GPU."""


def unsupported(*, lhs: Array, rhs: Array, group_sizes: Array) -> str | None:
    reason = tokamax_calls.unsupported(lhs.dtype)
    if reason:
        return reason
    (M, K), N = lhs.shape, rhs.shape[2]
    if 0 in (M, K, N, rhs.shape[0]):
        return f"lhs has shape {lhs.shape}, rhs {rhs.shape}: nothing to compute"
    if any(size % (ROW if size < TILE else TILE) for size in (K, N)):
        return f"K={K}, N={N}; its kernels take multiples of {TILE}, and of {ROW} below that"
    return tokamax_calls.refused(_grouped, (lhs, rhs), group_sizes)


def run(*, lhs: Array, rhs: Array, group_sizes: Array) -> Array:
    return _grouped(lhs, rhs, group_sizes)


def _grouped(lhs: Array, rhs: Array, group_sizes: Array) -> Array:
    M, nothing = lhs.shape[0], jnp.zeros((), lhs.dtype)
    group_sizes = group_sizes.astype(jnp.int32)
    if M % TILE:
        lhs = jnp.pad(lhs, ((0, -M % TILE), (0, 0)))
    in_a_group = (jnp.arange(lhs.shape[0]) < group_sizes.sum())[:, None]
    out = tokamax_calls.ragged_dot(jnp.where(in_a_group, lhs, nothing), rhs, group_sizes)
    return jnp.where(in_a_group, out, nothing)[:M]
