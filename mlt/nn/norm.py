"""Root-mean-square and L2 normalization, always computed in float32."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from mlt.nn.param import ones, param, zeros

NormKind = Literal["rms", "layer"]


def rms_normalize(x: jax.Array, *, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) over the last dim, returned in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def layer_normalize(x: jax.Array, *, eps: float) -> jax.Array:
    """(x - mean(x)) / sqrt(var(x) + eps) over the last dim, returned in float32 (arXiv 1607.06450)."""
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)


def l2_normalize(x: jax.Array, *, eps: float = 1e-6) -> jax.Array:
    """x / sqrt(sum(x^2) + eps) over the last dim, computed in float32, returned in the input's type."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.sum(x32 * x32, axis=-1, keepdims=True) + eps)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """RMSNorm over the last dim with a learned scale (arXiv 1910.07467); output in the input's type.

    Args:
        unit_offset: multiply by 1 + scale, the scale starting at 0, so that decay pulls towards the identity.
        branches: of several, each has a scale of its own: x is (..., branches, size).
    """

    def __init__(self, size: int, *, axis: str | None = None, eps: float = 1e-6, unit_offset: bool = False, branches: int = 1):
        self.eps, self.unit_offset = eps, unit_offset
        shape, axes = ((size,), (axis,)) if branches == 1 else ((branches, size), ("branches", axis))
        self.scale = param(shape, axes, zeros if unit_offset else ones, group="vector")

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.scale[...] + 1.0 if self.unit_offset else self.scale[...]
        return (rms_normalize(x, eps=self.eps) * scale).astype(x.dtype)


class LayerNorm(nnx.Module):
    """LayerNorm over the last dim with a learned scale and bias (arXiv 1607.06450); output in the input's type."""

    def __init__(self, size: int, *, axis: str | None = None, eps: float = 1e-5):
        self.eps = eps
        self.scale = param((size,), (axis,), ones, group="vector")
        self.bias = param((size,), (axis,), zeros, group="vector")

    def __call__(self, x: jax.Array) -> jax.Array:
        return (layer_normalize(x, eps=self.eps) * self.scale[...] + self.bias[...]).astype(x.dtype)


def stream_norm(kind: NormKind, size: int, *, eps: float, unit_offset: bool) -> RMSNorm | LayerNorm:
    """A norm of the residual stream; the offset is read by RMSNorm alone."""
    if kind == "layer":
        return LayerNorm(size, axis="embed", eps=eps)
    return RMSNorm(size, axis="embed", eps=eps, unit_offset=unit_offset)
