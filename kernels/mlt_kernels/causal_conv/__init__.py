"""Depthwise causal convolution: the short token mixer in front of most recurrences."""

from collections.abc import Sequence
from typing import Any

from jax import Array

from mlt_kernels import dispatch
from mlt_kernels.shapes import Shapes

OP = "causal_conv"
ACTIVATIONS = ("silu",)


def causal_conv(
    x: Array,
    kernel: Array,
    *,
    bias: Array | None = None,
    activation: str | None = None,
    dilation: int = 1,
    segment_ids: Array | None = None,
    halo: Array | None = None,
    return_halo: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> Any:
    """Convolves every channel on its own over the current and earlier tokens of the same document:

        y_t = activation(bias + sum over w < W of kernel[w] * x_{t - (W - 1 - w) * dilation})

    so the last tap reads the current token. Tokens of other documents, and before the row, read as zero.

    Args:
      x: (B, T, D).
      kernel: (W, D).
      bias: (D,) or None.
      activation: "silu" or None.
      dilation: distance between taps, in tokens.
      segment_ids: (B, T) integer, 0 for padding.
      halo: (B, (W - 1) * dilation, D), the inputs in front of the row; they belong to the segment of token 0.
        None for zeros.
      return_halo: also return the halo for a row that goes on behind this one: the last (W - 1) * dilation inputs,
        zero where they are not of the last token's document.
      implementation: see `mlt_kernels.dispatch`.

    Returns:
      y (B, T, D) in the dtype of x, or (y, halo). Sums are float32 (float64 if any input is).

    Raises:
      ValueError, TypeError: a shape, dtype or option is wrong.
      UnsupportedError: the implementations asked for cannot run this call.
    """
    shapes = Shapes(OP)
    shapes.check("x", x, "B T D")
    shapes.check("kernel", kernel, "W D")
    shapes.positive("dilation", dilation)
    if shapes["T"] == 0 or shapes["W"] == 0:
        raise ValueError(f"{OP}: x has shape {x.shape}, kernel {kernel.shape}; expected at least one token and one tap")
    if bias is not None:
        shapes.check("bias", bias, "D")
    if activation is not None:
        shapes.option("activation", activation, ACTIVATIONS)
    if segment_ids is not None:
        shapes.check("segment_ids", segment_ids, "B T", kind="integer")
    if halo is not None:
        shapes.check("halo", halo, f"B {(shapes['W'] - 1) * dilation} D")
    arguments = {
        "x": x,
        "kernel": kernel,
        "bias": bias,
        "activation": activation,
        "dilation": dilation,
        "segment_ids": segment_ids,
        "halo": halo,
        "return_halo": return_halo,
    }
    return dispatch.call(OP, implementation, arguments)
