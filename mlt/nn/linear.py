"""Linear maps over one or more trailing dims."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from mlt.nn.param import Init, fan_in, param, zeros


class Linear(nnx.Module):
    """y[..., out] = x[..., in] @ kernel[in, out] (+ bias), with `in` and `out` of any number of dims.

    The kernel is cast to the input's type: the stream's type is the compute type.

    Args:
        in_axes: (logical axis, size) of each contracted dim.
        out_axes: (logical axis, size) of each produced dim.
        init: defaults to a normal of standard deviation 1 / sqrt(input size).
    """

    def __init__(
        self,
        in_axes: tuple[tuple[str | None, int], ...],
        out_axes: tuple[tuple[str | None, int], ...],
        *,
        init: Init | None = None,
        bias: bool = False,
    ):
        names, sizes = zip(*in_axes, *out_axes, strict=True)
        self.num_in = len(in_axes)
        self.kernel = param(sizes, names, init or fan_in(math.prod(sizes[: self.num_in])))
        out_names, out_sizes = zip(*out_axes, strict=True)
        self.bias = param(out_sizes, out_names, zeros, group="vector") if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.tensordot(x, self.kernel[...].astype(x.dtype), axes=self.num_in)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)
