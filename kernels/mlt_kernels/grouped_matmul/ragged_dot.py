"""XLA's own ragged product, for platforms that do not expand it to a dense product per group."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from mlt_kernels import dispatch


def unsupported(**_: Any) -> str | None:
    if dispatch.platform() == "cpu":
        return "on cpu lax.ragged_dot computes every group for every row: E times the work"
    return None


def run(*, lhs: Array, rhs: Array, group_sizes: Array) -> Array:
    # Output and cotangents in the inputs' dtype: a wider output would make the backward products mixed and slow.
    return lax.ragged_dot(lhs, rhs, group_sizes.astype(jnp.int32))
