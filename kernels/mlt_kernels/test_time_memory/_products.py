"""The matrix products inside a memory: float32, whatever the type of the tokens.

Operands of 16 bits would be enough for the loss of a linear memory and no other: see "Products" in docs/test_time_memory.md.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mlt_kernels import dispatch

HIGHEST = jax.lax.Precision.HIGHEST
Product = Callable[[Array, Array], Array]


def product_for(low: Any, wide: Any) -> Product:
    """The product (..., m, k) (..., k, n) of a call whose tokens have the dtype `low`, in the dtype `wide`.

    Tokens of 16 bits on an accelerator: `in_halves`, at a third of the rate of 16-bit matrix units. float32 units have a
    fifteenth of it on an H200. All other calls: one float32 (float64) product.
    """
    if dispatch.platform() != "cpu" and jnp.finfo(low).bits == 16 and wide == jnp.float32:
        return in_halves
    return lambda a, b: jnp.matmul(a.astype(wide), b.astype(wide), precision=HIGHEST)


@jax.custom_vjp
def in_halves(a: Array, b: Array) -> Array:
    """a @ b with each operand the sum of two bfloat16: a1 b1 + a1 b2 + a2 b1, one product of three times the length.

    Operands keep 16 digits, twice those of bfloat16; sums are float32. The gradients are products of the same kind, so they
    may be differentiated again. Batch dims are equal.
    """
    (a1, a2), (b1, b2) = _halves(a), _halves(b)
    left, right = jnp.concatenate([a1, a1, a2], axis=-1), jnp.concatenate([b1, b2, b1], axis=-2)
    if dispatch.platform() == "cpu":  # the same sum where XLA has no batched product of bfloat16 into float32
        return jnp.matmul(left.astype(jnp.float32), right.astype(jnp.float32), precision=HIGHEST)
    return jnp.matmul(left, right, preferred_element_type=jnp.float32)


def _in_halves_fwd(a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return in_halves(a, b), (a, b)


def _in_halves_bwd(operands: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    a, b = operands
    d_a, d_b = in_halves(grad, jnp.swapaxes(b, -2, -1)), in_halves(jnp.swapaxes(a, -2, -1), grad)
    return d_a.astype(a.dtype), d_b.astype(b.dtype)


in_halves.defvjp(_in_halves_fwd, _in_halves_bwd)


def _halves(x: Array) -> tuple[Array, Array]:
    """Two bfloat16 whose sum is x but for its last 8 digits."""
    x = x.astype(jnp.float32)
    # Not a cast there and back, which XLA may leave out.
    first = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return first.astype(jnp.bfloat16), (x - first).astype(jnp.bfloat16)
