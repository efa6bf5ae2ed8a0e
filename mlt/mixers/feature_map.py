"""Feature maps of linear attention: what stands in for the exponential of softmax attention."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mlt.nn.param import given, param

Name = Literal["elu", "relu", "identity", "hedgehog"]
POSITIVE: tuple[Name, ...] = ("elu", "hedgehog")
"""Maps whose features are positive everywhere, so that their products can be divided by."""


class Hedgehog(nnx.Module):
    """phi(x) = [exp(x W), exp(-x W)], one learned W a head (arXiv 2402.04347), starting at the identity.

    Returned as a distribution and the logarithm of its scale, phi = exp(log_scale) * features, so that nothing overflows:
    the scale of a query's features cancels in the quotient of linear attention, and that of a key's is what
    `linear_recurrence` takes as `log_input`.
    """

    def __init__(self, heads: int, size: int):
        self.kernel = param((heads, size, size), ("heads", "head_dim", None), given(np.eye(size, dtype=np.float32), "identity"))

    def __call__(self, x_BTHK: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x (B, T, H, K) -> features (B, T, H, 2K) in its type, log scale (B, T, H) float32."""
        half = jnp.einsum("bthk,hkf->bthf", x_BTHK, self.kernel[...].astype(x_BTHK.dtype)).astype(jnp.float32)
        logits = jnp.concatenate([half, -half], axis=-1)
        return jax.nn.softmax(logits, axis=-1).astype(x_BTHK.dtype), jax.nn.logsumexp(logits, axis=-1)


def elementwise(name: Name, x: jax.Array) -> jax.Array:
    """elu(x) + 1 (arXiv 2006.16236), relu(x) or x; float32 inside, the input's type outside."""
    if name == "identity":
        return x
    wide = x.astype(jnp.float32)
    return (jax.nn.elu(wide) + 1 if name == "elu" else jax.nn.relu(wide)).astype(x.dtype)
