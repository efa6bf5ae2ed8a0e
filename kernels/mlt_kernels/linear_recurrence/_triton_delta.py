"""The delta rule in Triton kernels: `_triton_delta_scalar` (no decay or one decay a head: DeltaNet, gated delta) and
`_triton_delta_vector` (one a key dim: KDA). This file ties their forward and backward passes together.

Forward: the triangular matrix of every chunk is inverted, all chunks at once; then one walk over the chunks with a slab of V of
the state in registers, from which only o leaves (and the states that the caller asks for). What is kept for the backward pass
beside the inputs are the inverses: C numbers a token and head, in float32 or three parts of 16 bits.

Backward: always the states that enter the chunks again and all that is written (one more such walk), then a walk backwards with
the cotangent of the state, then kernels that take one chunk each. States and their cotangents (2 K V / C numbers a token and
head, in the dtype of the operands) live inside the backward pass only. With T = (I + S)^-1, W = T R what a chunk writes and
X = T^T dW, the gradient of R is X and that of S is -X W^T: no inverse is differentiated. T, W, X and all that they are
multiplied with inside a chunk keep float32 or two parts of it, since sums over repeated keys cancel: see `_triton_delta_tools`.

A row is not cut into pieces: with few heads and slabs of V in all, the walks do not fill a card.
"""

import functools
from typing import Any

import jax
from jax import Array

from mlt_kernels import triton_calls
from mlt_kernels.linear_recurrence._kernel_inputs import Arrays
from mlt_kernels.linear_recurrence._triton_delta_call import Call
from mlt_kernels.linear_recurrence._triton_delta_scalar import ScalarCall
from mlt_kernels.linear_recurrence._triton_delta_vector import VectorCall
from mlt_kernels.linear_recurrence._triton_tools import Settings


def chunk_length(K: int, V: int, item_bytes: int, vector: bool = False) -> int:
    """Tokens of a chunk: 64 fill Hopper's matrix unit. Float32 products are three, for which the registers do not do; and where
    keys repeat, short chunks lose less to rounding."""
    return 16 if item_bytes == 4 else 64


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def recurrence(settings: Settings, arrays: Arrays, segment_ids: Array | None) -> tuple[Array, Array, Array | None]:
    """o, the final state and the states entering every `stride`-th chunk. T is a multiple of the chunk."""
    return _forward(settings, arrays, segment_ids)[0]


def _forward(settings: Settings, arrays: Arrays, segment_ids: Array | None) -> tuple[Any, Any]:
    call, stride = _call(settings, arrays, segment_ids), settings.stride
    call.prepare()
    inverse = call.solve()
    outputs = [call.like(arrays.v), call.state(), call.states(stride) if stride else call.unused(), call.unused()]
    o, final, states, _ = call.run(inverse, outputs, OUTPUT=True, STRIDE=stride or 0)
    return (o, final, states if stride else None), (arrays, segment_ids, inverse)


def _backward(settings: Settings, saved: Any, grads: Any) -> tuple[Arrays, None]:
    with triton_calls.interpret(settings.interpret):  # A gradient may be traced after the caller has left it.
        return _gradients(settings, *saved, *grads), None


recurrence.defvjp(_forward, _backward)


def _gradients(
    settings: Settings,
    arrays: Arrays,
    segment_ids: Array | None,
    inverse: Array,
    do: Array,
    d_final: Array,
    d_entering: Array | None,
) -> Arrays:
    call = _call(settings, arrays, segment_ids)
    call.prepare()
    states, write = call.states(1, call.low), call.written()
    _, _, states, write = call.run(inverse, [call.unused(), call.unused(), states, write], OUTPUT=False, STRIDE=1)
    pull, d_states, d_initial = call.reverse(inverse, do, d_final, d_entering)
    grads = call.gradients(do, write, pull, states, d_states)
    return grads._replace(state=None if arrays.state is None else d_initial)


def _call(settings: Settings, arrays: Arrays, segment_ids: Array | None) -> Call:
    vector = arrays.g is not None and arrays.g.ndim == 4
    return (VectorCall if vector else ScalarCall)(settings, arrays, segment_ids)
