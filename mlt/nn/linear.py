"""Linear maps over one or more trailing dims.

Where the input is of a narrower type than the parameters, gradients of the parameters are summed in the parameters' type, over
tokens and, as they leave a device in it, over devices. A sum in bfloat16 stops growing once it is 256 times its addends.
"""

import functools
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
        y = contract(x, self.kernel[...], self.num_in)
        return y if self.bias is None else (y + self.bias[...]).astype(y.dtype)


def contract(x: jax.Array, kernel: jax.Array, num_in: int) -> jax.Array:
    """The last `num_in` dims of x with the first of the kernel, in x's type; the kernel's gradient is summed in the kernel's."""
    if x.dtype == kernel.dtype:
        return jnp.tensordot(x, kernel, axes=num_in)
    return _mixed(x, kernel, num_in)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _mixed(x, kernel, num_in):
    return jnp.tensordot(x, kernel.astype(x.dtype), axes=num_in)


def _mixed_fwd(x, kernel, num_in):
    return _mixed(x, kernel, num_in), (x, kernel)


def _mixed_bwd(num_in, saved, grad):
    x, kernel = saved
    tokens, outs = tuple(range(x.ndim - num_in)), kernel.ndim - num_in
    produced = tuple(range(grad.ndim - outs, grad.ndim)), tuple(range(num_in, kernel.ndim))
    d_x = jax.lax.dot_general(grad, kernel.astype(x.dtype), (produced, ((), ())))
    wide = jnp.promote_types(x.dtype, kernel.dtype)
    d_kernel = jax.lax.dot_general(x, grad, ((tokens, tokens), ((), ())), preferred_element_type=wide)
    return d_x, d_kernel.astype(kernel.dtype)


_mixed.defvjp(_mixed_fwd, _mixed_bwd)
