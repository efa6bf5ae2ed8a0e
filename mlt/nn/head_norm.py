"""Normalization of each head on its own, in float32."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from mlt.nn.norm import rms_normalize
from mlt.nn.param import ones, param

Kind = Literal["layer", "rms"]


class HeadNorm(nnx.Module):
    """Layer or RMS norm over the last dim of (..., heads, dim), with a learned scale for every channel of every head.

    One group a head: group norm without its bias (arXiv 1803.08494). Output in the input's type.
    """

    def __init__(self, heads: int, size: int, *, kind: Kind = "layer", eps: float = 1e-6):
        self.kind, self.eps = kind, eps
        self.scale = param((heads, size), ("heads", "head_dim"), ones, group="vector")

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        if self.kind == "layer":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        return (rms_normalize(wide, eps=self.eps) * self.scale[...]).astype(x.dtype)
