"""The elementwise nonlinearities of feed-forward layers, by the names that configs use."""

import jax
import jax.numpy as jnp

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
}
"""relu2 is the squared ReLU of Primer (arXiv 2109.08668); a config class says which of them it takes."""
