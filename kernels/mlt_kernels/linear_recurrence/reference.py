"""The token loop, as the recurrence is written. Float64 inputs are computed in float64."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mlt_kernels import segments
from mlt_kernels.linear_recurrence import NormalizedState

EMPTY_LOG_SCALE = -1e30
"""Log scale of an empty state."""
LARGEST_BOUND = 40.0
"""The mLSTM bound exp(-m) stops here: below it is rounding error, and its square must not underflow."""


def unsupported(**_: Any) -> str | None:
    return None


def run(
    *,
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | None,
    beta: Array | None,
    rule: str,
    log_input: Array | None,
    normalizer: str,
    scale: float,
    initial_state: Array | NormalizedState | None,
    segment_ids: Array | None,
    chunk_size: int,
    return_final_state: bool,
    return_chunk_states: bool,
) -> Any:
    B, T, H, V = v.shape
    K = q.shape[-1]
    wide = jnp.result_type(jnp.float32, *(x for x in (q, k, v, log_decay, beta) if x is not None))
    q_BTHK, k_BTHK = (jnp.repeat(x.astype(wide), H // q.shape[2], axis=2) for x in (q, k))
    v_BTHV = v.astype(wide)
    g = jnp.zeros((H,), wide) if log_decay is None else log_decay
    g_BTHK = jnp.broadcast_to(g[..., None] if g.ndim != 4 else g, (B, T, H, K))
    beta_BTH = jnp.ones((B, T, H), wide) if beta is None else beta
    input_BTH = jnp.zeros((B, T, H), wide) if log_input is None else log_input
    if segment_ids is None:
        start_BT, real_BT = jnp.zeros((B, T), bool), jnp.ones((B, T), bool)
    else:
        start_BT, real_BT = segments.starts(segment_ids), segment_ids != 0

    empty = EMPTY_LOG_SCALE if normalizer == "sum" else 0.0
    floor = 0.0 if normalizer == "mlstm" else EMPTY_LOG_SCALE
    if isinstance(initial_state, NormalizedState):
        carry = tuple(x.astype(wide) for x in initial_state)
    else:
        state = jnp.zeros((B, H, K, V), wide) if initial_state is None else initial_state.astype(wide)
        carry = (state, jnp.zeros((B, H, K), wide), jnp.full((B, H), empty, wide))

    def token(carry: tuple[Array, Array, Array], xs: tuple[Array, ...]) -> tuple[Any, Any]:
        S_BHKV, n_BHK, m_BH = carry
        q_BHK, k_BHK, v_BHV, g_BHK, beta_BH, input_BH, start_B, real_B = xs
        entering = S_BHKV
        fresh = start_B[:, None]
        S_BHKV = jnp.where(fresh[..., None, None], 0, S_BHKV)
        n_BHK = jnp.where(fresh[..., None], 0, n_BHK)
        m_BH = jnp.where(fresh, empty, m_BH)
        if normalizer == "none":
            new_m_BH = jnp.zeros_like(m_BH)
            decay_BHK = jnp.exp(g_BHK)
            write_BH = beta_BH * jnp.exp(input_BH)
        else:
            # Any running scale gives the same o; as a constant it also keeps the gradients free of noise.
            kept_BH = g_BHK[..., 0] + m_BH
            new_m_BH = jax.lax.stop_gradient(jnp.maximum(jnp.maximum(kept_BH, input_BH), floor))
            decay_BHK = jnp.exp(kept_BH - new_m_BH)[..., None]
            write_BH = beta_BH * jnp.exp(input_BH - new_m_BH)
        decayed_BHKV = decay_BHK[..., None] * S_BHKV
        u_BHV = v_BHV
        if rule == "delta":
            u_BHV = v_BHV - jnp.einsum("bhk,bhkv->bhv", k_BHK, decayed_BHKV)
        new_S_BHKV = decayed_BHKV + jnp.einsum("bh,bhk,bhv->bhkv", write_BH, k_BHK, u_BHV)
        new_n_BHK = decay_BHK * n_BHK + write_BH[..., None] * k_BHK
        o_BHV = jnp.einsum("bhk,bhkv->bhv", q_BHK, new_S_BHKV)
        real = real_B[:, None]
        if normalizer != "none":
            sum_BH = jnp.einsum("bhk,bhk->bh", q_BHK, new_n_BHK)
            if normalizer == "mlstm":
                sum_BH = jnp.maximum(jnp.abs(sum_BH), jnp.exp(-jnp.minimum(new_m_BH, LARGEST_BOUND)))
            o_BHV = o_BHV / jnp.where(sum_BH == 0, 1, sum_BH)[..., None]
        carry = (
            jnp.where(real[..., None, None], new_S_BHKV, S_BHKV),
            jnp.where(real[..., None], new_n_BHK, n_BHK),
            jnp.where(real, new_m_BH, m_BH),
        )
        return carry, (jnp.where(real[..., None], o_BHV, 0), entering if return_chunk_states else None)

    xs = (q_BTHK * scale, k_BTHK, v_BTHV, g_BTHK, beta_BTH, input_BTH, start_BT, real_BT)
    with jax.default_matmul_precision("highest"):
        carry, (o_TBHV, entering) = jax.lax.scan(token, carry, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), xs))
    result: list[Any] = [jnp.moveaxis(o_TBHV, 0, 1).astype(v.dtype)]
    if return_final_state:
        result.append(carry[0] if normalizer == "none" else NormalizedState(*carry))
    if return_chunk_states:
        result.append(jnp.moveaxis(entering[::chunk_size], 0, 1))
    return result[0] if len(result) == 1 else tuple(result)
