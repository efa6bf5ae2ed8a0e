"""Rows of a table in 8 bits: float8 e4m3 values, with one power of two (e8m0) to scale every 32 of them.

The scale is the smallest that leaves no value beyond 448, the largest of e4m3; rounding is to nearest, ties to even. Both are
computed in whole numbers of the bits, so every backend rounds alike. What is rounded once stays as it is.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

E4M3, E8M0 = np.dtype(jnp.float8_e4m3fn), np.dtype(jnp.float8_e8m0fnu)
GROUP = 32
"""Values that share a scale."""

BLOCK_VALUES = 2**22
"""Values of a table that are rounded at once: what is made beside the result is a few times their size."""

_LARGEST = 8, 0x600000  # 448 is 1.75 * 2^8
_SMALLEST_SCALE = -126
_SMALLEST_NORMAL = -6
_MANTISSA = 3


def stored_bytes(num_rows: int, width: int) -> int:
    """Bytes of a table that is stored in 8 bits, scales included."""
    return num_rows * (width + width // GROUP)


@jax.custom_vjp
def rounded(rows: jax.Array) -> jax.Array:
    """The float32 values (..., V) that 8 bits hold of these, V a multiple of 32; the gradient passes straight through."""
    return _rounded(rows)[0]


rounded.defvjp(lambda rows: (_rounded(rows)[0], None), lambda _, grad: (grad,))


def stored(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(values (..., V) float8_e4m3fn, scales (..., V / 32) float8_e8m0fnu) of float rows (..., V)."""
    width = rows.shape[-1]
    flat, block = rows.reshape(-1, width), max(1, BLOCK_VALUES // width)
    codes, scales = np.empty(flat.shape, E4M3), np.empty((len(flat), width // GROUP), np.uint8)
    for start in range(0, len(flat), block):
        values, exponents = map(np.asarray, _rounded_block(flat[start : start + block]))
        scaled = np.ldexp(values.reshape(*exponents.shape, GROUP), -exponents[..., None])
        codes[start : start + block] = scaled.reshape(values.shape).astype(E4M3)
        scales[start : start + block] = exponents + 127
    return codes.reshape(rows.shape), scales.reshape(*rows.shape[:-1], -1).view(E8M0)


def restored(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The float32 rows that `stored` made these of, as far as 8 bits hold them."""
    exponents = scales.view(np.uint8).astype(np.int32) - 127
    groups = codes.astype(np.float32).reshape(*scales.shape, GROUP)
    return np.ldexp(groups, exponents[..., None]).reshape(codes.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows8:
    """A table that is held in 8 bits, in the place of its array: for reading alone, on one device.

    Attributes:
        codes: (M, V) float8_e4m3fn, or stacked (L, M, V).
        exponents: (M, V / 32) uint8, 127 more than the scales' exponents, or stacked.
    """

    codes: jax.Array
    exponents: jax.Array

    @classmethod
    def of(cls, rows: np.ndarray) -> "Rows8":
        codes, scales = stored(rows)
        return cls(jnp.asarray(codes), jnp.asarray(scales.view(np.uint8)))

    def __getitem__(self, index: Any) -> "Rows8":
        if index is not ...:
            raise TypeError("a table that is held in 8 bits is read by row ids alone")
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def read(self, ids: jax.Array) -> jax.Array:
        """Rows (..., V) float32 of int32 ids (...); zeros where an id is negative."""
        take = lambda part: jnp.take(part, jnp.maximum(ids, 0), axis=0)  # noqa: E731
        exponents = take(self.exponents).astype(jnp.int32) - 127
        groups = take(self.codes).astype(jnp.float32).reshape(*exponents.shape, GROUP)
        rows = (groups * _power(exponents)[..., None]).reshape(*ids.shape, -1)
        return jnp.where((ids >= 0)[..., None], rows, 0.0)


@jax.jit
def _rounded_block(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _rounded(rows)


def _rounded(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(values that 8 bits hold (..., V) float32, exponent of each group's scale (..., V / 32) int32)."""
    groups = rows.astype(jnp.float32).reshape(*rows.shape[:-1], -1, GROUP)
    largest = jnp.abs(groups).max(-1, keepdims=True)
    mantissa = jax.lax.bitcast_convert_type(largest, jnp.int32) & 0x7FFFFF
    exponent = jnp.maximum(_exponent(largest) - _LARGEST[0] + (mantissa > _LARGEST[1]), _SMALLEST_SCALE)
    scaled = groups * _power(-exponent)
    # Spacing of e4m3 at each value: an eighth of its power of two, and of 2^-6 below that.
    spacing = jnp.maximum(_exponent(scaled), _SMALLEST_NORMAL) - _MANTISSA
    whole = jnp.round(scaled * _power(-spacing))
    return (whole * _power(spacing) * _power(exponent)).reshape(rows.shape), exponent[..., 0]


def _exponent(x: jax.Array) -> jax.Array:
    """floor(log2(|x|)) of float32; -127 for zero and subnormal numbers."""
    return ((jax.lax.bitcast_convert_type(x, jnp.int32) >> 23) & 0xFF) - 127


def _power(exponent: jax.Array) -> jax.Array:
    """2^exponent, which must lie in [-126, 127], as float32."""
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
