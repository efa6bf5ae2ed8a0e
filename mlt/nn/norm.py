"""Root-mean-square and L2 normalization, always computed in float32."""

import jax
import jax.numpy as jnp
from flax import nnx

from mlt.nn.param import ones, param


def rms_normalize(x: jax.Array, *, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) over the last dim, returned in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def l2_normalize(x: jax.Array, *, eps: float = 1e-6) -> jax.Array:
    """x / sqrt(sum(x^2) + eps) over the last dim, computed in float32, returned in the input's type."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.sum(x32 * x32, axis=-1, keepdims=True) + eps)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """RMSNorm over the last dim with a learned scale (arXiv 1910.07467); output in the input's type."""

    def __init__(self, size: int, *, axis: str | None = None, eps: float = 1e-6):
        self.eps = eps
        self.scale = param((size,), (axis,), ones, group="vector")

    def __call__(self, x: jax.Array) -> jax.Array:
        return (rms_normalize(x, eps=self.eps) * self.scale[...]).astype(x.dtype)
