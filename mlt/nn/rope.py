"""Rotary position embedding (arXiv 2104.09864), half-split layout as in Llama."""

import jax
import jax.numpy as jnp
import numpy as np


def rope_frequencies(base: float, width: int) -> np.ndarray:
    """(width / 2,) float32 radians per position of each rotated pair: base^(-2i/width)."""
    half = width // 2
    return (base ** (-np.arange(half, dtype=np.float64) / half)).astype(np.float32)


def apply_rope(
    x_BTNH: jax.Array,
    positions_BT: jax.Array,
    *,
    base: float,
    frequency: np.ndarray | None = None,
    gain: float = 1.0,
) -> jax.Array:
    """Rotate pairs (i, i + R/2) of the first R channels by positions * base^(-2i/R); the others pass.

    Args:
        x_BTNH: queries or keys.
        positions_BT: of their tokens.
        base: of the frequencies where `frequency` is None; R is then the whole width.
        frequency: (R/2,) radians per position of each pair.
        gain: factor on the rotated channels.

    Returns:
        As x_BTNH. Angles are float32, whatever the input's type.
    """
    if frequency is None:
        half = x_BTNH.shape[-1] // 2
        frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    half = frequency.shape[0]
    angle_BT1H = positions_BT[:, :, None, None].astype(jnp.float32) * frequency
    sin, cos = jnp.sin(angle_BT1H), jnp.cos(angle_BT1H)
    if gain != 1.0:
        sin, cos = sin * gain, cos * gain
    first, second, rest = jnp.split(x_BTNH.astype(jnp.float32), (half, 2 * half), axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
    return rotated.astype(x_BTNH.dtype)
