"""Token embedding."""

import jax
import jax.numpy as jnp
from flax import nnx

from mlt.nn.param import normal, param


class Embedding(nnx.Module):
    """Rows of a (vocab, embed) table looked up by token id."""

    def __init__(self, vocab_size: int, d_model: int, *, std: float = 0.02):
        self.table = param((vocab_size, d_model), ("vocab", "embed"), normal(std), group="embedding")

    def __call__(self, token_ids_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return jnp.take(self.table[...], token_ids_BT, axis=0, mode="clip").astype(dtype)
