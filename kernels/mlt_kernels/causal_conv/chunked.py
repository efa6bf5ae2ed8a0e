"""Portable form: one shifted, masked multiply-add a tap, which XLA fuses into one pass over the row.

It is the form for a TPU too: nothing is left for a kernel to fuse.
"""

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
    y = x.astype(wide) * kernel[-1].astype(wide)
    for w in range(W - 1):
        start = w * dilation
        tap_BTD = inputs[:, start : start + T].astype(wide) * kernel[w].astype(wide)
        if segment_ids is not None:
            own_BT1 = (run_[:, start : start + T] == run_[:, context:])[..., None]
            tap_BTD = jnp.where(own_BT1, tap_BTD, 0)
        y = y + tap_BTD
    if bias is not None:
        y = y + bias.astype(wide)
    if activation == "silu":
        y = jax.nn.silu(y)
    y = y.astype(x.dtype)
    return (y, following(inputs, run_, context)) if return_halo else y
