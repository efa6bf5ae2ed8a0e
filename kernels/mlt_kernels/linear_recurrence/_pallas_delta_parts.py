"""Products that keep what cancels, for the delta rule's Pallas kernels on a GPU and on a TPU.

Where keys repeat and beta is 2, what a chunk writes is twice its state with signs that alternate. Rounded to bfloat16 one by one,
64 writes leave an error of some 2 % in every sum over tokens, and so does what tokens weigh in such a sum. These products take
float32 matrices in two bfloat16 parts, 16 bits: two or three products on the same unit instead of one.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mlt_kernels.linear_recurrence._kernel_inputs import HIGHEST

UPPER_BITS = -(1 << 16)


def parts(x: Array, low: Any, number: int = 2) -> list[Array]:
    """Matrices of type `low` that add up to x, float32 or of that type: one, or `number` for bfloat16, of 8 bits each."""
    if x.dtype == low:
        return [x]
    found = []
    for _ in range(number - 1):
        # Cut, not cast and cast back: XLA may leave both casts out, and what the next part is made of with them.
        bits = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(UPPER_BITS)
        high = jax.lax.bitcast_convert_type(bits, jnp.float32)
        found.append(high.astype(low))
        x = x - high
    return [*found, x.astype(low)]


def fine_dot(a: Array, b: Array, low: Any, contract: tuple[int, int] = (1, 0)) -> Array:
    """Product of two matrices, float32 or of type `low`, summed in float32; `contract` names the summed dim of each."""
    return parts_dot(parts(a, low), parts(b, low), low, contract, 2)


def parts_dot(of_a: list[Array], of_b: list[Array], low: Any, contract: tuple[int, int], digits: int) -> Array:
    """Product of two sums of matrices of type `low`, without what is below so many parts of the largest."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    precision = HIGHEST if low == jnp.float32 else None
    pairs = [(x, y) for i, x in enumerate(of_a) for j, y in enumerate(of_b) if i + j < digits]
    first, *rest = (jax.lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32) for x, y in pairs)
    return sum(rest, first)


def low_dot(a: Array, b: Array, low: Any, contract: tuple[int, int] = (1, 0)) -> Array:
    """The same product of matrices rounded to `low`, for what does not cancel."""
    return fine_dot(a.astype(low), b.astype(low), low, contract)
