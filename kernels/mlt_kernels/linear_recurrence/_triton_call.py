"""What calls of the Triton kernels share on the side of JAX: what all kernels read, shapes of results, launches.

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
from mlt_kernels.linear_recurrence._triton_tools import Settings, Sizes

PACKAGE = "linear_recurrence._triton_"


class Call(abc.ABC):
    """The kernels of one call, with what all of them read."""

    def __init__(self, settings: Settings, arrays: Arrays, segment_ids: Array | None):
        self.settings, self.arrays, self.C, self.low = settings, arrays, settings.chunk, arrays.q.dtype
        (self.B, self.T, self.H, self.V), (self.HK, self.K) = arrays.v.shape, arrays.q.shape[2:]
        self.J = self.T // self.C
        self.documents, self.place = given.documents(segment_ids, self.C)
        self.borders = (None, None) if self.documents is None else tuple(self.documents)
        self.u = None if arrays.u is None else jnp.swapaxes(arrays.u, 1, 2)
        self.levels: dict[str, Any] = {"LEVELS": self.C.bit_length() - 1}
        self.options = {
            "HK": self.HK,
            "V": self.V,
            "SCALE": settings.scale,
            "HAS_G": arrays.g is not None,
            "HAS_U": arrays.u is not None,
            "HAS_DOCS": self.documents is not None,
            "GATED": settings.gated,
        }

    @abc.abstractmethod
    def at(self, kernel: str) -> Sizes:
        """Block sizes of a kernel."""

    @abc.abstractmethod
    def slabs(self, kernel: str) -> int:
        """Programs that share a head, or one chunk of it."""

    def unused(self) -> jax.ShapeDtypeStruct:
        """Stands for a result that a kernel's options tell it not to write."""
        return jax.ShapeDtypeStruct((1,), jnp.float32)

    def float32(self, *shape: int, wanted: bool = True) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32) if wanted else self.unused()

    def like(self, x: Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype)

    def state(self) -> jax.ShapeDtypeStruct:
        """(B, H, K, V) float32."""
        return self.float32(self.B, self.H, self.K, self.V)

    def states(self, stride: int | None, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        """(B, N, H, K, V): one for every `stride` chunks."""
        if not stride:
            return self.unused()
        return jax.ShapeDtypeStruct((self.B, -(-self.J // stride), self.H, self.K, self.V), dtype)

    def squares(self, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        """(B, H, J, C, C)."""
        return jax.ShapeDtypeStruct((self.B, self.H, self.J, self.C, self.C), dtype)

    def of_keys(self, dtype: Any = None) -> jax.ShapeDtypeStruct:
        """(B, T, H, K), in the dtype of the operands unless another is named."""
        return jax.ShapeDtypeStruct((self.B, self.T, self.H, self.K), dtype or self.low)

    def d_key(self) -> jax.ShapeDtypeStruct:
        """A query/key head that several value heads read has its gradient summed over them, in float32."""
        return self.of_keys(self.low if self.HK == self.H else jnp.float32)

    def write_gradient(self, felt: Array) -> Array | None:
        """(B, T, H) of felt (X, B, H, T): the sum over the slabs; zeros if write strengths only mark padding."""
        if self.settings.gated:
            return jnp.swapaxes(jnp.sum(felt, axis=0), 1, 2)
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
