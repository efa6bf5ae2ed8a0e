"""The add rule in Triton kernels: `_triton_add_scalar` (no decay or one decay a head) and `_triton_add_vector` (one a key dim).
This file ties their forward and backward passes together.
"""

import functools
from types import ModuleType
from typing import Any

import jax
from jax import Array

from mlt_kernels import triton_calls
from mlt_kernels.linear_recurrence import _triton_add_scalar, _triton_add_vector
from mlt_kernels.linear_recurrence._kernel_inputs import Arrays
from mlt_kernels.linear_recurrence._triton_tools import Settings


def chunk_length(K: int, V: int, item_bytes: int, vector: bool) -> int:
    """Tokens of a chunk: 64 fill Hopper's matrix unit; float32 products are three, for which the registers do not do."""
    if triton_calls.interpreting():
        return 16
    return 16 if item_bytes == 4 else 32 if max(K, V) > 128 and not vector else 64


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def recurrence(settings: Settings, arrays: Arrays, segment_ids: Array | None) -> tuple[Array, Array, Array | None]:
    """o, the final state and the states entering every `stride`-th chunk. T is a multiple of the chunk."""
    return _forward(settings, arrays, segment_ids)[0]


def _forward(settings: Settings, arrays: Arrays, segment_ids: Array | None) -> tuple[Any, Any]:
    return _kernels(arrays.g).forward(settings, arrays, segment_ids), (arrays, segment_ids)


def _backward(settings: Settings, saved: Any, grads: Any) -> tuple[Arrays, None]:
    with triton_calls.interpret(settings.interpret):  # A gradient may be traced after the caller has left it.
        return _kernels(saved[0].g).backward(settings, *saved, *grads), None


recurrence.defvjp(_forward, _backward)


def _kernels(g: Array | None) -> ModuleType:
    return _triton_add_vector if g is not None and g.ndim == 4 else _triton_add_scalar
