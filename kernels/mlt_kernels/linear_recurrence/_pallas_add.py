"""The recurrence in Pallas kernels: the add rule for a GPU in `_pallas_add_scalar` (no decay or one decay a head) and
`_pallas_add_vector` (one a key dim), for a TPU in `_pallas_add_tpu`; the delta rule for a TPU in `_pallas_delta_tpu`; both rules
with one decay a key dim, for a TPU, in `_pallas_vector_tpu`. This file prepares their arguments and ties their forward and
backward passes together.

Gates, sums of gates, states and accumulators are float32. Products take operands of the dtype of q, k and v; those of
float32 are three TF32 products (see `_pallas_tools.dot`). On a GPU, dims must be powers of two from 16 to 256: Triton's
tiles are powers of two and its products need 16.

Status: numbers checked in interpret mode, programs lowered and compiled for an H200; not run on a GPU.

Letters: B rows, T tokens, H value heads, K key dim, V value dim.
"""

import contextlib
import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mlt_kernels import pallas
from mlt_kernels.grids import unsupported_shape
from mlt_kernels.linear_recurrence import _kernel_inputs as given
from mlt_kernels.linear_recurrence import (
    _normalized,
    _pallas_add_scalar,
    _pallas_add_tpu,
    _pallas_add_vector,
    _pallas_delta_tpu,
    _pallas_vector_tpu,
)
from mlt_kernels.linear_recurrence import _pallas_tools as tools
from mlt_kernels.linear_recurrence._kernel_inputs import Arrays
from mlt_kernels.linear_recurrence._pallas_tools import Settings

TPU_CHUNK = 128
"""Tokens of a chunk on a TPU: the width of its matrix unit."""
TPU_FULL_CHUNK = 32
"""The same with float32 operands under the delta rule, where a larger inverse loses more to rounding if keys repeat, and with
one decay a key dim, where larger tiles would not fit the fast memory."""
INTERPRETED_CHUNK = {"add": 16, "delta": 32}
"""Tokens of a chunk where TPU kernels are interpreted: small tests cross every kind of border, also that between the blocks
of 16 which the delta rule inverts."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def recurrence(settings: Settings, arrays: Arrays, segment_ids: Array | None) -> tuple[Array, Array | None, Array | None]:
    """o, the final state and the states entering every `state_stride`-th chunk. T is a multiple of the chunk."""
    return _forward(settings, arrays, segment_ids)[0]


def _forward(settings: Settings, arrays: Arrays, segment_ids: Array | None) -> tuple[Any, Any]:
    with _context(settings):
        results = _kernels(settings, arrays).forward(settings, arrays, segment_ids)
    return results, (arrays, segment_ids)


def _backward(settings: Settings, residuals: Any, grads: Any) -> tuple[Arrays, None]:
    arrays, segment_ids = residuals
    with _context(settings):
        return _kernels(settings, arrays).backward(settings, arrays, segment_ids, *grads), None


recurrence.defvjp(_forward, _backward)


def _kernels(settings: Settings, arrays: Arrays) -> ModuleType:
    vector = arrays.g is not None and arrays.g.ndim == 4
    if settings.platform == "gpu":
        return _pallas_add_vector if vector else _pallas_add_scalar
    return _pallas_vector_tpu if vector else _pallas_delta_tpu if settings.rule == "delta" else _pallas_add_tpu


def _context(settings: Settings) -> Any:
    """A gradient may be traced after the caller has left interpret mode."""
    return pallas.interpret() if settings.interpreting else contextlib.nullcontext()


def unsupported(
    *,
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | None,
    beta: Array | None,
    chunk_size: int,
    return_chunk_states: bool,
    **_: Any,
) -> str | None:
    K, V = q.shape[-1], v.shape[-1]
    for name, dim in (("K", K), ("V", V)):
        if dim & (dim - 1) or not given.SMALLEST <= dim <= given.LARGEST:
            return f"{name}={dim}; a Triton kernel takes powers of two from {given.SMALLEST} to {given.LARGEST}"
    if jnp.float64 in {x.dtype for x in (q, k, v, log_decay, beta) if x is not None}:
        return "float64 arguments; the kernels compute in float32"
    if return_chunk_states and chunk_size < given.SMALLEST:
        return f"return_chunk_states with chunk_size={chunk_size}; a Triton product needs {given.SMALLEST} tokens"
    return unsupported_shape("v", v.shape)


def run(*, normalizer: str, platform: str = "gpu", **arguments: Any) -> Any:
    plain = functools.partial(_plain, platform=platform)
    if normalizer == "none":
        return plain(normalizer=normalizer, **arguments)
    return _normalized.run(plain, normalizer=normalizer, **arguments)


def _tpu_chunk(rule: str, low: Any, *, vector: bool) -> int:
    if pallas.interpreting():
        return INTERPRETED_CHUNK[rule]
    return TPU_FULL_CHUNK if low == jnp.float32 and (vector or rule == "delta") else TPU_CHUNK


def _plain(
    *,
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | None,
    beta: Array | None,
    rule: str,
    log_input: Array | None,
    normalizer: str,
    scale: float,
    initial_state: Array | None,
    segment_ids: Array | None,
    chunk_size: int,
    return_final_state: bool,
    return_chunk_states: bool,
    platform: str,
) -> Any:
    (T, V), K, low = (v.shape[1], v.shape[3]), q.shape[3], jnp.result_type(q, k, v)
    vector = log_decay is not None and log_decay.ndim == 4
    if platform == "gpu":
        length, least = tools.blocks("forward", K, V, q.dtype.itemsize, vector=vector).chunk, given.SMALLEST
    else:
        length, least = _tpu_chunk(rule, low, vector=vector), 8
    length = given.chunk_length(length, least, T, chunk_size if return_chunk_states else None)
    arrays, segment_ids = given.whole_chunks(
        q=q,
        k=k,
        v=v,
        log_decay=log_decay,
        beta=beta,
        log_input=log_input,
        initial_state=initial_state,
        segment_ids=segment_ids,
        length=length,
    )
    stride = chunk_size // length if return_chunk_states else None
    settings = Settings(
        platform=platform,
        rule=rule,
        scale=scale,
        chunk=length,
        return_final=return_final_state,
        state_stride=stride,
        gated_writes=beta is not None or log_input is not None,
        anchor=stride or (given.INTERPRETED_ANCHOR if pallas.interpreting() else given.ANCHOR),
        interpreting=pallas.interpreting(),
    )
    return given.returned(recurrence(settings, arrays, segment_ids), v, return_final_state, return_chunk_states)
