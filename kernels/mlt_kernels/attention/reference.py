"""All scores at once, as the definition is written. Float64 inputs are computed in float64."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mlt_kernels.attention import EMPTY_LSE, Pair


def unsupported(**_: Any) -> str | None:
    return None


def run(
    *,
    q: Array,
    k: Array,
    v: Array,
    causal: bool,
    window: int | None,
    segment_ids: tuple[Array, Array] | None,
    positions: Pair | None,
    sinks: Array | None,
    softcap: float | None,
    scale: float,
    bias: Array | None,
    return_lse: bool,
) -> Any:
    B, T, N, _ = q.shape
    S, K = k.shape[1:3]
    wide = jnp.result_type(jnp.float32, q)
    q_BTNH = q.astype(wide)
    k_BSNH, v_BSNP = (jnp.repeat(x.astype(wide), N // K, axis=2) for x in (k, v))
    with jax.default_matmul_precision("highest"):
        x_BNTS = scale * jnp.einsum("btnh,bsnh->bnts", q_BTNH, k_BSNH)
        if softcap is not None:
            x_BNTS = softcap * jnp.tanh(x_BNTS / softcap)
        if bias is not None:
            x_BNTS = x_BNTS + bias.astype(wide)

        visible_BNTS = jnp.ones((B, 1, T, S), bool)
        if segment_ids is not None:
            queries, keys = (x[:, None] for x in segment_ids)
            visible_BNTS &= (queries[..., :, None] == keys[..., None, :]) & (keys != 0)[..., None, :]
        if causal:
            queries, keys = positions or (None, None)
            queries = jnp.arange(T)[None] + S - T if queries is None else queries
            keys = jnp.arange(S)[None] if keys is None else keys
            distance_BNTS = (queries[:, :, None] - keys[:, None, :])[:, None]
            visible_BNTS &= distance_BNTS >= 0
            if window is not None:
                visible_BNTS &= distance_BNTS < window

        # A sink is one more key, with a logit of its own and the value 0.
        if sinks is not None:
            sink_BNT1 = jnp.broadcast_to(sinks.astype(wide)[:, None, None], (B, N, T, 1))
            x_BNTS = jnp.concatenate([x_BNTS, sink_BNT1], axis=-1)
            visible_BNTS = jnp.concatenate([visible_BNTS, jnp.ones((B, 1, T, 1), bool)], axis=-1)
            v_BSNP = jnp.pad(v_BSNP, ((0, 0), (0, 1), (0, 0), (0, 0)))

        x_BNTS = jnp.where(visible_BNTS, x_BNTS, -jnp.inf)
        top_BNT1 = jax.lax.stop_gradient(x_BNTS.max(axis=-1, keepdims=True))
        empty_BNT1 = top_BNT1 == -jnp.inf
        e_BNTS = jnp.where(empty_BNT1, 0, jnp.exp(x_BNTS - jnp.where(empty_BNT1, 0, top_BNT1)))
        sum_BNT1 = jnp.where(empty_BNT1, 1, e_BNTS.sum(axis=-1, keepdims=True))
        o_BTNP = jnp.einsum("bnts,bsnp->btnp", e_BNTS / sum_BNT1, v_BSNP).astype(q.dtype)
    if not return_lse:
        return o_BTNP
    lse_BNT1 = jnp.where(empty_BNT1, EMPTY_LSE, top_BNT1 + jnp.log(sum_BNT1))
    return o_BTNP, lse_BNT1[..., 0].swapaxes(1, 2)
