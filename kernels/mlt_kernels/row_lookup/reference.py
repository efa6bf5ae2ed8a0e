"""Every row gathered, then summed. Float64 inputs are computed in float64."""

from typing import Any

import jax.numpy as jnp
from jax import Array


def unsupported(**_: Any) -> str | None:
    return None


def run(*, table: Array, indices: Array, weights: Array | None) -> Array:
    wide = jnp.result_type(jnp.float32, table, *(() if weights is None else (weights,)))
    found_TK = (indices >= 0) & (indices < table.shape[0])
    # Widened before the gather, so that its gradient is summed wide.
    rows_TKD = jnp.where(found_TK[..., None], table.astype(wide)[jnp.where(found_TK, indices, 0)], 0)
    if weights is None:
        return rows_TKD.astype(table.dtype)
    pooled_TD = (weights.astype(wide)[..., None] * rows_TKD).sum(axis=1)
    return pooled_TD.astype(jnp.result_type(table, weights))
