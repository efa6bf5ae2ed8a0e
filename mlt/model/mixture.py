"""Next-token distributions of two models put together: an LM and a memory beside it."""

import jax
import jax.numpy as jnp


def log_mixture(model: jax.Array, memory: jax.Array, share: jax.Array | float) -> jax.Array:
    """log((1 - share) p_model + share p_memory) of log-probabilities of any equal shapes (arXiv 1911.00172, 2508.09874).

    A share of 0 or 1 gives the one or the other, to the bit.
    """
    share = jnp.asarray(share, jnp.float32)
    return jnp.logaddexp(jnp.log1p(-share) + model, jnp.log(share) + memory)
