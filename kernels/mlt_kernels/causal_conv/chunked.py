"""Portable form: one shifted, masked multiply-add a tap, which XLA fuses into one pass over the row.

So is the gradient of the inputs. Those of kernel and bias are sums over all tokens, which XLA's CPU backend reads column by
column: there they are summed a few rows at a time, ten times as fast.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from mlt_kernels import dispatch
from mlt_kernels.causal_conv._halo import extend, following

ROWS = 16
"""Tokens that one step of a sum adds on a CPU; 32 and 64 were 1.3 and 1.6 times as slow."""


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
    context = (kernel.shape[0] - 1) * dilation
    inputs, run_ = extend(x, segment_ids, halo, context)
    y = _convolve(activation, dilation, inputs, None if segment_ids is None else run_, kernel, bias)
    return (y, following(inputs, run_, context)) if return_halo else y


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _convolve(
    activation: str | None, dilation: int, inputs: Array, run_: Array | None, kernel: Array, bias: Array | None
) -> Array:
    """y (B, T, D) of inputs (B, L + T, D) with L tokens of context in front, `run_` (B, L + T) or None for one document."""
    y = _before_activation(dilation, inputs, run_, kernel, bias)
    return (jax.nn.silu(y) if activation == "silu" else y).astype(inputs.dtype)


def _before_activation(dilation: int, inputs: Array, run_: Array | None, kernel: Array, bias: Array | None) -> Array:
    W = kernel.shape[0]
    T = inputs.shape[1] - (W - 1) * dilation
    kernel = kernel.astype(jnp.result_type(jnp.float32, inputs, kernel))
    y = _tap(W - 1, dilation, T, inputs, run_) * kernel[-1]
    for w in range(W - 1):
        y = y + _tap(w, dilation, T, inputs, run_) * kernel[w]
    return y if bias is None else y + bias.astype(y.dtype)


def _tap(w: int, dilation: int, T: int, inputs: Array, run_: Array | None) -> Array:
    """What tap w reads at each token (B, T, D); 0 where that is of another document."""
    start, context = w * dilation, inputs.shape[1] - T
    read = inputs[:, start : start + T]
    if run_ is None or start == context:
        return read
    return jnp.where((run_[:, start : start + T] == run_[:, context:])[..., None], read, 0)


def _convolve_fwd(activation: str | None, dilation: int, *given: Any) -> Any:
    return _convolve(activation, dilation, *given), given


def _convolve_bwd(activation: str | None, dilation: int, given: Any, d_y: Array) -> Any:
    inputs, run_, kernel, bias = given
    W, length = kernel.shape[0], inputs.shape[1]
    context = (W - 1) * dilation
    T = length - context
    wide = jnp.result_type(jnp.float32, inputs, kernel, *(() if bias is None else (bias,)))
    d_y = d_y.astype(wide)
    if activation == "silu":
        y = _before_activation(dilation, inputs, run_, kernel, bias)
        gate = jax.nn.sigmoid(y)
        d_y = d_y * gate * (1 + y * (1 - gate))
    ends = ((0, 0), (context, context + -T % ROWS))
    d_read = lax.optimization_barrier(jnp.pad(d_y, (*ends, (0, 0))))  # made once, not again for each tap

    # The input at s is read through tap w by the token at s - w dilation of the row.
    reader = None if run_ is None else jnp.pad(run_[:, context:], ends, constant_values=-1)
    d_inputs = jnp.zeros((), wide)
    for w in range(W):
        start = context - w * dilation
        part = d_read[:, start : start + length] * kernel[w].astype(wide)
        if reader is not None:
            part = jnp.where((reader[:, start : start + length] == run_)[..., None], part, 0)
        d_inputs = d_inputs + part

    sums = (_sums_by_blocks if dispatch.platform() == "cpu" else _sums)(W, dilation, d_read, inputs, run_)
    d_bias = None if bias is None else sums[W].astype(bias.dtype)
    return d_inputs.astype(inputs.dtype), None, sums[:W].astype(kernel.dtype), d_bias


_convolve.defvjp(_convolve_fwd, _convolve_bwd)


def _sums(W: int, dilation: int, d_read: Array, inputs: Array, run_: Array | None) -> Array:
    """(W + 1, D): the sums over all tokens of the cotangent times what each tap reads, and of the cotangent."""
    context = (W - 1) * dilation
    d_y = d_read[:, context : inputs.shape[1]]
    products = [d_y * _tap(w, dilation, d_y.shape[1], inputs, run_) for w in range(W)]
    return jnp.stack([jnp.sum(p, axis=(0, 1)) for p in (*products, d_y)])


def _sums_by_blocks(W: int, dilation: int, d_read: Array, inputs: Array, run_: Array | None) -> Array:
    """`_sums`, ROWS tokens of every row at a time."""
    B, length, D = inputs.shape
    context = (W - 1) * dilation
    T = length - context
    ends = ((0, 0), (0, -T % ROWS))
    inputs, run_ = jnp.pad(inputs, (*ends, (0, 0))), None if run_ is None else jnp.pad(run_, ends)

    def block(total: Array, at: Array) -> tuple[Array, None]:
        own = lax.dynamic_slice_in_dim(d_read, context + at, ROWS, axis=1)
        read, of = (None if x is None else lax.dynamic_slice_in_dim(x, at, ROWS + context, axis=1) for x in (inputs, run_))
        products = [own * _tap(w, dilation, ROWS, read, of) for w in range(W)]
        return total + jnp.stack([sum(p[:, r] for r in range(ROWS)) for p in (*products, own)]), None

    total_WBD, _ = lax.scan(block, jnp.zeros((W + 1, B, D), d_read.dtype), jnp.arange(0, T, ROWS))
    return jnp.sum(total_WBD, axis=1)
