"""Every row gathered, then summed. Float64 inputs are computed in float64."""

from typing import Any

import jax.numpy as jnp
from jax import Array


def unsupported(**_: Any) -> str | None:
    return None


def run(*, table: Array, indices: Array, weights: Array | None) -> Array:
    found_TK = (indices >= 0) & (indices < table.shape[0])
    rows_TKD = jnp.where(found_TK[..., None], table[jnp.where(found_TK, indices, 0)], 0)
    if weights is None:
        return rows_TKD
    wide = jnp.result_type(jnp.float32, table, weights)
    pooled_TD = (weights.astype(wide)[..., None] * rows_TKD.astype(wide)).sum(axis=1)
    return pooled_TD.astype(jnp.result_type(table, weights))
