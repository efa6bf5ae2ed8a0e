"""Every group times every row, masked. Float64 inputs are computed in float64."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def unsupported(**_: Any) -> str | None:
    return None


def run(*, lhs: Array, rhs: Array, group_sizes: Array) -> Array:
    wide = jnp.result_type(jnp.float32, lhs)
    end_E = jnp.cumsum(group_sizes)
    row_M = jnp.arange(lhs.shape[0])
    mine_EM = (row_M >= (end_E - group_sizes)[:, None]) & (row_M < end_E[:, None])
    with jax.default_matmul_precision("highest"):
        out_MN = jnp.zeros((lhs.shape[0], rhs.shape[2]), wide)
        for mine_M, rhs_KN in zip(mine_EM, rhs.astype(wide), strict=True):
            out_MN += jnp.where(mine_M[:, None], lhs, 0).astype(wide) @ rhs_KN
    return out_MN.astype(lhs.dtype)
