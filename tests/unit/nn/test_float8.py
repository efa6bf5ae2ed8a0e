"""Rows in 8 bits against a quantizer on NumPy's own float8, to the bit."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from mlt.nn.float8 import GROUP, restored, rounded, stored, stored_bytes


def quantized(rows: np.ndarray) -> np.ndarray:
    """Group by group: the smallest power of two that leaves nothing above 448, then the cast of ml_dtypes."""
    out = np.empty(rows.shape, np.float64)
    for index in np.ndindex(*rows.shape[:-1], rows.shape[-1] // GROUP):
        where = (*index[:-1], slice(index[-1] * GROUP, (index[-1] + 1) * GROUP))
        group = rows[where].astype(np.float64)
        exponent = -126
        while np.abs(group).max() > 448 * 2.0**exponent:
            exponent += 1
        out[where] = (group / 2.0**exponent).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * 2.0**exponent
    return out


def cases() -> np.ndarray:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((40, 2 * GROUP)) * 10.0 ** rng.integers(-6, 7, (40, 1))
    rows[0], rows[1, ::2] = 0, 0
    rows[2] *= 10.0 ** rng.integers(-6, 1, 2 * GROUP)
    # Largest values at, just above and just below 448 times a power of two, ties, and what is too small for a value.
    rows[3, :4] = 448, 1 / 1024, 3 / 1024, 1 / 512
    rows[4, :2] = np.nextafter(np.float32(448), np.float32(500)), 7 / 1024
    rows[5] = np.arange(2 * GROUP) / 16 + 16
    rows[6] = np.arange(2 * GROUP) + 0.5
    rows[7, 0] = 1e-37
    rows[8] = -rows[6]
    return rows.astype(np.float32)


def test_values_are_those_of_a_plain_quantizer():
    rows = cases()
    expected = quantized(rows).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(jax.jit(rounded)(rows)), expected)
    np.testing.assert_array_equal(np.asarray(rounded(jnp.asarray(expected))), expected)
    codes, scales = stored(rows)
    assert (codes.dtype, scales.dtype) == (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu)
    assert (codes.shape, scales.shape) == (rows.shape, (40, 2))
    np.testing.assert_array_equal(restored(codes, scales), expected)
    assert codes.nbytes + scales.nbytes == stored_bytes(40, 2 * GROUP)
    groups = np.abs(codes.astype(np.float32)).reshape(40, 2, GROUP).max(-1)
    full = np.abs(rows).reshape(40, 2, GROUP).max(-1) > 1e-30
    assert (groups[full] >= 224).all()


def test_error_is_at_most_a_sixteenth():
    rows = np.random.default_rng(1).standard_normal((100, 256)).astype(np.float32)
    error = np.abs(np.asarray(rounded(rows)) - rows)
    smallest = np.abs(rows).reshape(100, 8, GROUP).max(-1, keepdims=True).repeat(GROUP, -1).reshape(rows.shape) / 2**14
    assert (error <= np.maximum(np.abs(rows) / 16, smallest)).all()


def test_the_gradient_passes_straight_through():
    rows = jnp.asarray(cases())
    weights = jnp.asarray(np.random.default_rng(2).standard_normal(rows.shape), jnp.float32)
    np.testing.assert_array_equal(jax.jit(jax.grad(lambda rows: (rounded(rows) * weights).sum()))(rows), weights)
