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
from mlt_kernels.linear_recurrence import _normalized, _triton_add, _triton_delta
from mlt_kernels.linear_recurrence._kernel_inputs import LARGEST, LOWEST, SMALLEST, Arrays
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
        if not 1 <= dim <= LARGEST:
            return f"{name}={dim}; its kernels take 1 to {LARGEST}"
    if jnp.float64 in {x.dtype for x in (q, k, v, log_decay, beta) if x is not None}:
        return "float64 arguments; its kernels compute in float32"
    if return_chunk_states and chunk_size < SMALLEST:
        return f"return_chunk_states with chunk_size={chunk_size}; a Triton product needs {SMALLEST} tokens"
    return f"v has shape {v.shape}: nothing to compute" if 0 in v.shape else None


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
    kernels = RULES[rule]
    B, T, H, V = v.shape
    low = jnp.result_type(q, k, v)
    vector = log_decay is not None and log_decay.ndim == 4
    length = kernels.chunk_length(q.shape[-1], V, low.itemsize, vector)
    if return_chunk_states:
        length = min(length, chunk_size)
    length = max(SMALLEST, min(length, 1 << (T - 1).bit_length()))
    gated = beta is not None or log_input is not None
    u = beta if log_input is None else jnp.exp(log_input) if beta is None else beta * jnp.exp(log_input)
    g = None if log_decay is None else jnp.maximum(log_decay, LOWEST)
    if g is not None and g.ndim == 1:
        g = jnp.broadcast_to(g, (B, T, H))
    if segment_ids is not None:
        real = (segment_ids != 0)[..., None]
        u = jnp.where(real, jnp.float32(1.0) if u is None else u, 0.0) * jnp.ones((1, 1, H), jnp.float32)
        g = None if g is None else jnp.where(real[..., None] if vector else real, g, 0.0)

    def padded(x: Array) -> Array:
        return jnp.pad(x, [(0, 0), (0, -T % length)] + [(0, 0)] * (x.ndim - 2))

    arrays = Arrays(
        *(padded(x.astype(low)) for x in (q, k, v)),
        g=None if g is None else padded(g),
        u=None if u is None else padded(u),
        state=None if initial_state is None else initial_state.astype(jnp.float32),
    )
    stride = chunk_size // length if return_chunk_states else None
    settings = Settings(scale, length, stride, gated, triton_calls.interpreting())
    results: Any = kernels.recurrence(settings, arrays, None if segment_ids is None else padded(segment_ids))
    o, final, states = results
    result = [o[:, :T].astype(v.dtype)]
    if return_final_state:
        result.append(final)
    if return_chunk_states:
        result.append(states)
    return result[0] if len(result) == 1 else tuple(result)


@functools.wraps(_plain)
def run(*, normalizer: str, **arguments: Any) -> Any:
    if normalizer == "none":
        return _plain(normalizer=normalizer, **arguments)
    return _normalized.run(_plain, normalizer=normalizer, **arguments)
