"""Short blocks of a document, seen from the token that ends them."""

import jax
import jax.numpy as jnp


def last_tokens(x: jax.Array, count: int) -> jax.Array:
    """The last `count` tokens of (B, S, ...), zeros in front where there are fewer."""
    missing = max(count - x.shape[1], 0)
    return jnp.pad(x, [(0, 0), (missing, 0)] + [(0, 0)] * (x.ndim - 2))[:, x.shape[1] + missing - count :]


def ending_at(x: jax.Array, count: int, size: int) -> jax.Array:
    """(B, count, size, ...): for each of the last `count` tokens, the `size` tokens up to and with it, zeros before the first."""
    x = last_tokens(x, count + size - 1)
    return jnp.stack([x[:, o : o + count] for o in range(size)], axis=2)


def ends(segment_ids_BT: jax.Array, positions_BT: jax.Array, size: int) -> jax.Array:
    """(B, T) bool: the token ends a block of `size` tokens, counted from the start of its document."""
    return (positions_BT % size == size - 1) & (segment_ids_BT != 0)
