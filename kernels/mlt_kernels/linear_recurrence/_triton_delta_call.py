"""What the Triton kernels of the delta rule share on the side of JAX: block sizes, shapes of results, launches.

Letters: B rows, T tokens, J chunks, C tokens of a chunk, H value heads, X slabs, K key dim, V value dim.
"""

import abc
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mlt_kernels import triton_calls
from mlt_kernels.linear_recurrence import _kernel_inputs as given
from mlt_kernels.linear_recurrence._kernel_inputs import Arrays
from mlt_kernels.linear_recurrence._triton_tools import Settings, Sizes, power_of_two

PACKAGE = "linear_recurrence._triton_"
WALKS = ("delta_run", "delta_reverse", "kda_run", "kda_reverse")
"""Kernels whose programs own a slab of V and walk over the chunks; the others take one chunk each."""


def sizes(kernel: str, K: int, V: int, item_bytes: int) -> Sizes:
    """One choice for every GPU until one is measured: registers and spills are in kernels/reports/triton_registers.md."""
    whole_K, whole_V = power_of_two(K), power_of_two(V)
    if triton_calls.interpreting():
        return Sizes(whole_K if kernel in WALKS else 16, 16, 4, 1)
    full, vector = item_bytes == 4, kernel.startswith("kda")
    if kernel in ("delta_solve", "delta_invert"):
        return Sizes(min(whole_K, 64), 16, 4, 1)
    if kernel in WALKS:
        wide = vector and not full and K <= 128
        warps = 8 if vector or full or K > 128 else 4
        return Sizes(whole_K, min(whole_V, 64 if wide else 32), warps, 1 if full or (vector and K > 128) else 2)
    keys = 32 if full or kernel == "kda_keys" else 64
    return Sizes(min(whole_K, keys), min(whole_V, 32 if full else 64), 4 if full else 8, 1 if vector else 2)


class Call(abc.ABC):
    """The kernels of one call, with what all of them read."""

    def __init__(self, settings: Settings, arrays: Arrays, segment_ids: Array | None):
        self.settings, self.arrays, self.C, self.low = settings, arrays, settings.chunk, arrays.q.dtype
        (self.B, self.T, self.H, self.V), (self.HK, self.K) = arrays.v.shape, arrays.q.shape[2:]
        self.J = self.T // self.C
        self.documents, self.place = given.documents(segment_ids, self.C)
        self.borders = (None, None) if self.documents is None else tuple(self.documents)
        self.u = None if arrays.u is None else jnp.swapaxes(arrays.u, 1, 2)
        self.options = {
            "HK": self.HK,
            "V": self.V,
            "SCALE": settings.scale,
            "HAS_G": arrays.g is not None,
            "HAS_U": arrays.u is not None,
            "HAS_DOCS": self.documents is not None,
            "GATED": settings.gated,
            "REFINE": self.low == jnp.float32,
        }

    @abc.abstractmethod
    def prepare(self) -> None:
        """Runs what both passes need first."""

    @abc.abstractmethod
    def solve(self) -> Array:
        """(B, H, J, C, C): the inverse for each chunk."""

    @abc.abstractmethod
    def run(self, inverse: Array, outputs: list[jax.ShapeDtypeStruct], *, OUTPUT: bool, STRIDE: int) -> list[Array]:
        """o and the final state if OUTPUT, states if STRIDE > 0, and what is written unless OUTPUT."""

    @abc.abstractmethod
    def reverse(self, inverse: Array, do: Array, d_final: Array, d_entering: Array | None) -> list[Array]:
        """X, the cotangents of the states that leave the chunks, and that of the initial state."""

    @abc.abstractmethod
    def gradients(self, do: Array, write: Array, pull: Array, states: Array, d_states: Array) -> Arrays:
        """All but that of the initial state."""

    def unused(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1,), jnp.float32)

    def float32(self, *shape: int, wanted: bool = True) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32) if wanted else self.unused()

    def like(self, x: Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype)

    def state(self) -> jax.ShapeDtypeStruct:
        return self.float32(self.B, self.H, self.K, self.V)

    def states(self, stride: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.B, -(-self.J // stride), self.H, self.K, self.V), dtype)

    def squares(self, dtype: Any = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.B, self.H, self.J, self.C, self.C), dtype or self.low)

    def of_keys(self, dtype: Any = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.B, self.T, self.H, self.K), dtype or self.low)

    def d_key(self) -> jax.ShapeDtypeStruct:
        """A query/key head that several value heads read has its gradient summed over them, in float32."""
        return self.of_keys(self.low if self.HK == self.H else jnp.float32)

    def reverse_outputs(self) -> list[jax.ShapeDtypeStruct]:
        """Shapes of the results of `reverse`."""
        return [self.like(self.arrays.v), self.states(1, self.low), self.state()]

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

    def launch(
        self,
        kernel: str,
        takes: str,
        inputs: list[Any],
        outputs: list[Any],
        *,
        slabs: int | None = None,
        chunks: bool = True,
        **more: Any,
    ) -> list[Array]:
        """Runs a kernel over (slabs, head, row).

        Args:
          kernel: the rest of its module's name, and its own.
          takes: names of its options among those of the call, beside H and C.
          slabs: programs of a head; by default those of a walk.
          chunks: whether it is told J behind T.
        """
        name = kernel.split(":")[1]
        at = self.at(name)
        known = self.options | {"K": self.K, "KEYS": at.keys, "VALUES": at.values}
        return triton_calls.call(
            PACKAGE + kernel,
            [*(triton_calls.nothing() if x is None else x for x in inputs), self.T, *([self.J] if chunks else [])],
            outputs,
            grid=(self.slabs(name) if slabs is None else slabs, self.H, self.B),
            warps=at.warps,
            stages=at.stages,
            H=self.H,
            C=self.C,
            **{option: known[option] for option in takes.split()},
            **more,
        )
