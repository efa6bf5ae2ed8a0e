"""Normalised add rules by way of two plain ones.

The running log scale m is a function of the gates alone: a scan of scalars. Divided by exp(m), the recurrence is a plain one
with log decays g_t + m_{t-1} - m_t and log inputs i_t - m_t, none above 0; its key sum is the same recurrence with v = 1.

Letters: B rows, T tokens, H value heads, K key dim, V value dim.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mlt_kernels import segments
from mlt_kernels.linear_recurrence import NormalizedState
from mlt_kernels.linear_recurrence.reference import EMPTY_LOG_SCALE, LARGEST_BOUND

LOWEST = -128.0
ONES = 16
"""Value dim of the key sum's recurrence: the fewest columns that a kernel takes. The first is used."""


def run(
    plain: Callable[..., Any],
    *,
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | None,
    beta: Array | None,
    log_input: Array | None,
    normalizer: str,
    scale: float,
    initial_state: NormalizedState | None,
    segment_ids: Array | None,
    return_final_state: bool,
    **options: Any,
) -> Any:
    """`plain` takes the arguments of an un-normalised add rule that returns its final state."""
    B, T, H, _ = v.shape
    g_BTH = jnp.zeros((B, T, H), jnp.float32) if log_decay is None else jnp.maximum(log_decay, LOWEST)
    g_BTH = jnp.broadcast_to(g_BTH, (B, T, H))
    input_BTH = jnp.zeros((B, T, H), jnp.float32) if log_input is None else log_input
    empty = EMPTY_LOG_SCALE if normalizer == "sum" else 0.0
    entering_BH = jnp.full((B, H), empty, jnp.float32) if initial_state is None else initial_state.log_scale
    real_BT1 = None if segment_ids is None else (segment_ids != 0)[..., None]
    if real_BT1 is not None:
        g_BTH, input_BTH = jnp.where(real_BT1, g_BTH, 0.0), jnp.where(real_BT1, input_BTH, EMPTY_LOG_SCALE)

    floor = 0.0 if normalizer == "mlstm" else EMPTY_LOG_SCALE
    m_BTH = jax.lax.stop_gradient(_log_scale(g_BTH, input_BTH, entering_BH, segment_ids, floor))
    before_BTH = jnp.concatenate([entering_BH[:, None], m_BTH[:, :-1]], axis=1)
    log_scale_BH = m_BTH[:, -1]
    if real_BT1 is not None:
        # The given log scale, which has a gradient, is the scale until the first token that is not padding.
        seen_BT1 = jnp.cumsum(real_BT1, axis=1) - real_BT1 > 0
        before_BTH = jnp.where(seen_BT1, before_BTH, entering_BH[:, None])
        log_scale_BH = jnp.where(jnp.any(real_BT1, axis=1), log_scale_BH, entering_BH)

    shared = {
        **options,
        "log_decay": g_BTH + (before_BTH - m_BTH),
        "beta": beta,
        "log_input": input_BTH - m_BTH,
        "normalizer": "none",
        "scale": scale,
        "segment_ids": segment_ids,
        "return_final_state": True,
    }
    value, sums = (None, None) if initial_state is None else (initial_state.value, initial_state.key_sum)
    first = jnp.arange(ONES) == 0
    ones_BTHV = jnp.broadcast_to(first.astype(jnp.float32), (B, T, H, ONES))
    sums_BHKV = None if sums is None else jnp.where(first, sums[..., None], 0.0)
    o_BTHV, value_BHKV = plain(q=q, k=k, v=v, initial_state=value, **shared)
    wide = (x.astype(jnp.float32) for x in (q, k))
    sum_BTHV, sums_BHKV = plain(**dict(zip("qk", wide, strict=True)), v=ones_BTHV, initial_state=sums_BHKV, **shared)
    sum_BTH = sum_BTHV[..., 0]
    if normalizer == "mlstm":
        sum_BTH = jnp.maximum(jnp.abs(sum_BTH), jnp.exp(-jnp.minimum(m_BTH, LARGEST_BOUND)))
    o_BTHV = (o_BTHV / jnp.where(sum_BTH == 0, 1, sum_BTH)[..., None]).astype(v.dtype)
    if not return_final_state:
        return o_BTHV
    return o_BTHV, NormalizedState(value_BHKV, sums_BHKV[..., 0], log_scale_BH)


def _log_scale(g_BTH: Array, input_BTH: Array, entering_BH: Array, segment_ids: Array | None, floor: float) -> Array:
    """(B, T, H): m_t = max(g_t + m_{t-1}, i_t, floor), begun anew by every document and kept by padding."""
    least_BTH = jnp.maximum(input_BTH, floor)
    if segment_ids is not None:
        least_BTH = jnp.where((segment_ids != 0)[..., None], least_BTH, EMPTY_LOG_SCALE)
        g_BTH = jnp.where(segments.starts(segment_ids)[..., None], -jnp.inf, g_BTH)

    def after(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        return first[0] + second[0], jnp.maximum(first[1] + second[0], second[1])

    least_BTH = least_BTH.at[:, 0].max(g_BTH[:, 0] + entering_BH)
    return jax.lax.associative_scan(after, (g_BTH, least_BTH), axis=1)[1]
