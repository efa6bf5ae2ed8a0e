"""The oracle: one token after another, differentiated by jax."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mlt_kernels.segments import starts


def unsupported(**_: Any) -> str | None:
    return None


def run(
    *,
    x: Array,
    step: Array,
    A: Array,
    B: Array,
    C: Array,
    skip: Array | None,
    initial_state: Array | None,
    segment_ids: Array | None,
    state_dtype: Any,
) -> tuple[Array, Array]:
    wide = [v.astype(state_dtype) for v in (x, step, B, C)]
    A_DN = A.astype(state_dtype)
    skip_D = jnp.zeros(A.shape[0], state_dtype) if skip is None else skip.astype(state_dtype)
    state_BDN = jnp.zeros((x.shape[0], *A.shape), state_dtype) if initial_state is None else initial_state.astype(state_dtype)
    if segment_ids is None:
        start_BT, real_BT = jnp.zeros(x.shape[:2], bool), jnp.ones(x.shape[:2], bool)
    else:
        start_BT, real_BT = starts(segment_ids), segment_ids != 0

    def token(h_BDN: Array, xs: tuple[Array, ...]) -> tuple[Array, Array]:
        x_BD, step_BD, B_BN, C_BN, start_B, real_B = xs
        kept_BDN = jnp.where(start_B[:, None, None], 0, h_BDN)
        write_BDN = (step_BD * x_BD)[:, :, None] * B_BN[:, None]
        new_BDN = jnp.exp(step_BD[:, :, None] * A_DN) * kept_BDN + write_BDN
        y_BD = jnp.sum(new_BDN * C_BN[:, None], axis=-1) + skip_D * x_BD
        return jnp.where(real_B[:, None, None], new_BDN, h_BDN), jnp.where(real_B[:, None], y_BD, 0)

    tokens_first = tuple(jnp.moveaxis(v, 1, 0) for v in (*wide, start_BT, real_BT))
    final_BDN, y_TBD = jax.lax.scan(token, state_BDN, tokens_first)
    return jnp.moveaxis(y_TBD, 0, 1).astype(x.dtype), final_BDN
