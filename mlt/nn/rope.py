"""Rotary position embedding (arXiv 2104.09864), half-split layout as in Llama."""

import jax
import jax.numpy as jnp


def apply_rope(x_BTNH: jax.Array, positions_BT: jax.Array, *, base: float) -> jax.Array:
    """Rotate pairs (i, i + H/2) by positions * base^(-2i/H). Angles are float32, whatever the input's type."""
    half = x_BTNH.shape[-1] // 2
    frequency_H = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BT1H = positions_BT[:, :, None, None].astype(jnp.float32) * frequency_H
    sin, cos = jnp.sin(angle_BT1H), jnp.cos(angle_BT1H)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)
