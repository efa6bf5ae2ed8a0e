"""The oracle: one token after another, differentiated by jax."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mlt_kernels.diagonal_recurrence._resets import with_resets


def unsupported(**_: Any) -> str | None:
    return None


def run(
    *, a: Array, b: Array, initial_state: Array | None, segment_ids: Array | None, reverse: bool, state_dtype: Any
) -> tuple[Array, Array]:
    a, b = with_resets(a.astype(state_dtype), b.astype(state_dtype), segment_ids, reverse)
    start = jnp.zeros_like(a[:, 0]) if initial_state is None else initial_state.astype(state_dtype)

    def step(h: Array, coefficients: tuple[Array, Array]) -> tuple[Array, Array]:
        h = coefficients[0] * h + coefficients[1]
        return h, h

    tokens_first = (jnp.moveaxis(a, 1, 0), jnp.moveaxis(b, 1, 0))
    final, h = jax.lax.scan(step, start, tokens_first, reverse=reverse)
    return jnp.moveaxis(h, 0, 1), final
