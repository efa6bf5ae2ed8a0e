"""All logits at once, as the definition is written. Float64 inputs are computed in float64."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def unsupported(**_: Any) -> str | None:
    return None


def run(
    *,
    hidden: Array,
    unembedding: Array,
    labels: Array,
    weights: Array,
    z_loss: float,
    softcap: float | None,
    chunk_size: int,
    return_lse: bool,
) -> Any:
    wide = jnp.result_type(jnp.float32, hidden)
    V = unembedding.shape[1]
    with jax.default_matmul_precision("highest"):
        logits_BTV = jnp.einsum("btd,dv->btv", hidden.astype(wide), unembedding.astype(wide))
    if softcap is not None:
        logits_BTV = softcap * jnp.tanh(logits_BTV / softcap)
    lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    is_label_BTV = labels[..., None] == jnp.arange(V)
    label_logit_BT = jnp.where(is_label_BTV, logits_BTV, 0).sum(axis=-1)
    loss_BT = weights * (lse_BT - label_logit_BT + z_loss * lse_BT**2)
    return (loss_BT, lse_BT) if return_lse else loss_BT
