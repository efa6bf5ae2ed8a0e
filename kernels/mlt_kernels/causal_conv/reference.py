"""The oracle: gather the window of every token, mask it, contract it with the kernel."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mlt_kernels.causal_conv._halo import extend, following


def unsupported(**_: Any) -> str | None:
    return None


def run(
    *,
    x: Array,
    kernel: Array,
    bias: Array | None,
    activation: str | None,
    dilation: int,
    segment_ids: Array | None,
    halo: Array | None,
    return_halo: bool,
) -> Any:
    W, T = kernel.shape[0], x.shape[1]
    context = (W - 1) * dilation
    wide = jnp.result_type(jnp.float32, x.dtype, kernel.dtype)
    inputs, run_ = extend(x, segment_ids, halo, context)
    index_TW = jnp.arange(T)[:, None] + jnp.arange(W) * dilation
    window_BTWD = inputs[:, index_TW].astype(wide)
    own_BTW = run_[:, index_TW] == run_[:, context:, None]
    y = jnp.einsum("btwd,wd->btd", jnp.where(own_BTW[..., None], window_BTWD, 0), kernel.astype(wide))
    if bias is not None:
        y = y + bias.astype(wide)
    if activation == "silu":
        y = jax.nn.silu(y)
    y = y.astype(x.dtype)
    return (y, following(inputs, run_, context)) if return_halo else y
