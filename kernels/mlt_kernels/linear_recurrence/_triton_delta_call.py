"""What the Triton kernels of the delta rule share on the side of JAX: block sizes, steps, shapes of their own results.

Letters: B rows, T tokens, J chunks, C tokens of a chunk, H value heads, X slabs, K key dim, V value dim.
"""

import abc

import jax
import jax.numpy as jnp
from jax import Array

from mlt_kernels import triton_calls
from mlt_kernels.linear_recurrence import _triton_call
from mlt_kernels.linear_recurrence._kernel_inputs import Arrays
from mlt_kernels.linear_recurrence._triton_tools import Sizes, measured, power_of_two

WALKS = ("delta_run", "delta_reverse", "kda_run", "kda_reverse")
"""Kernels whose programs own a slab of V and walk over the chunks; the others take one chunk each."""


def sizes(kernel: str, K: int, V: int, item_bytes: int) -> Sizes:
    """The rule's, or those measured on the device."""
    if triton_calls.interpreting():
        return Sizes(power_of_two(K) if kernel in WALKS else 16, 16, 4, 1)
    vector = kernel.startswith("kda") or kernel in ("sums", "delta_invert")
    return measured(kernel, K, V, item_bytes, _rule(kernel, K, V, item_bytes), vector=vector)


def _rule(kernel: str, K: int, V: int, item_bytes: int) -> Sizes:
    """One choice that serves every GPU: registers and spills are in kernels/reports/triton_registers.md."""
    whole_K, whole_V = power_of_two(K), power_of_two(V)
    full, vector = item_bytes == 4, kernel.startswith("kda")
    if kernel in ("delta_solve", "delta_invert"):
        return Sizes(min(whole_K, 64 if full else 32), 16, 4, 1)
    if kernel in WALKS:
        return Sizes(whole_K, min(whole_V, 32), 8 if full or K > 128 else 4, 1 if full or vector else 2)
    keys = 64 if kernel == "delta_pairs" and not full else 16 if kernel == "kda_keys" and not full else 32
    return Sizes(min(whole_K, keys), min(whole_V, 32 if full else 64), 4 if full else 8, 1 if vector else 2)


class Call(_triton_call.Call):
    """A call of the delta rule: its steps, and shapes of results that only they have."""

    @abc.abstractmethod
    def prepare(self) -> None:
        """Runs what both passes need first."""

    @abc.abstractmethod
    def solve(self) -> Array:
        """(P, B, H, J, C, C): the inverse for each chunk, in parts."""

    @abc.abstractmethod
    def run(self, inverse: Array, outputs: list[jax.ShapeDtypeStruct], *, OUTPUT: bool, STRIDE: int) -> list[Array]:
        """o and the final state if OUTPUT, states if STRIDE > 0, and what is written unless OUTPUT."""

    @abc.abstractmethod
    def reverse(self, inverse: Array, do: Array, d_final: Array, d_entering: Array | None) -> list[Array]:
        """X, the cotangents of the states that leave the chunks, and that of the initial state."""

    @abc.abstractmethod
    def gradients(self, do: Array, write: Array, pull: Array, states: Array, d_states: Array) -> Arrays:
        """All but that of the initial state."""

    def written(self) -> jax.ShapeDtypeStruct:
        """What tokens write, or its cotangent: sums of it cancel, so it keeps 32 bits."""
        return self.float32(*self.arrays.v.shape)

    def parts(self, shape: jax.ShapeDtypeStruct, number: int = 2) -> jax.ShapeDtypeStruct:
        """(P, *shape) in the dtype of the operands: parts that add up to a float32 array, one if the operands are float32."""
        return jax.ShapeDtypeStruct((1 if self.low == jnp.float32 else number, *shape.shape), self.low)

    def reverse_outputs(self) -> list[jax.ShapeDtypeStruct]:
        """Shapes of the results of `reverse`."""
        return [self.written(), self.states(1, self.low), self.state()]

    def slabs(self, kernel: str) -> int:
        """Programs that share a head, or one chunk of it."""
        at = self.at(kernel)
        return -(-self.V // at.values) if kernel in WALKS else -(-self.K // at.keys)

    def at(self, kernel: str) -> Sizes:
        return sizes(kernel, self.K, self.V, self.low.itemsize)

    def d_u(self, of_values: Array, of_reads: Array) -> Array | None:
        """(B, T, H): zeros if write strengths only mark padding."""
        if self.settings.gated:
            return jnp.swapaxes(of_values + jnp.sum(of_reads, axis=0), 1, 2)
        return None if self.arrays.u is None else jnp.zeros_like(self.arrays.u)
