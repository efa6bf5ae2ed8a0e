"""GPU kernels in Triton, called through jax-triton: `_triton_add` for the add rule, `_triton_delta` for the delta rule. This
file prepares their arguments.

Gates, sums of gates, states and accumulators are float32. Products take operands of the dtype of q, k and v; those of
float32 are three TF32 products. K and V are any sizes up to 256: masks fill the tiles up to powers of two.

Status: numbers checked in Triton's interpreter, programs lowered and compiled for sm_90; not run on a GPU.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array

from mlt_kernels import triton_calls
from mlt_kernels.grids import unsupported_shape
from mlt_kernels.linear_recurrence import _kernel_inputs as given
from mlt_kernels.linear_recurrence import _normalized, _triton_add, _triton_delta
from mlt_kernels.linear_recurrence._triton_tools import Settings

RULES = {"add": _triton_add, "delta": _triton_delta}
"""Modules with `chunk_length` and `recurrence`."""


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
    reason = triton_calls.unsupported()
    if reason:
        return reason
    for name, dim in (("K", q.shape[-1]), ("V", v.shape[-1])):
        if not 1 <= dim <= given.LARGEST:
            return f"{name}={dim}; its kernels take 1 to {given.LARGEST}"
    if jnp.float64 in {x.dtype for x in (q, k, v, log_decay, beta) if x is not None}:
        return "float64 arguments; its kernels compute in float32"
    if return_chunk_states and chunk_size < given.SMALLEST:
        return f"return_chunk_states with chunk_size={chunk_size}; a Triton product needs {given.SMALLEST} tokens"
    return unsupported_shape("v", v.shape)


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
    initial_state: Any,
    segment_ids: Array | None,
    chunk_size: int,
    return_final_state: bool,
    return_chunk_states: bool,
) -> Any:
    kernels, vector = RULES[rule], log_decay is not None and log_decay.ndim == 4
    length = kernels.chunk_length(q.shape[-1], v.shape[-1], jnp.result_type(q, k, v).itemsize, vector)
    length = given.chunk_length(length, given.SMALLEST, v.shape[1], chunk_size if return_chunk_states else None)
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
    gated = beta is not None or log_input is not None
    settings = Settings(scale, length, stride, gated, triton_calls.interpreting())
    found = kernels.recurrence(settings, arrays, segment_ids)
    return given.returned(found, v, return_final_state, return_chunk_states)


@functools.wraps(_plain)
def run(*, normalizer: str, **arguments: Any) -> Any:
    if normalizer == "none":
        return _plain(normalizer=normalizer, **arguments)
    return _normalized.run(_plain, normalizer=normalizer, **arguments)
