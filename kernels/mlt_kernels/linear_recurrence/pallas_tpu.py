"""TPU kernels in Pallas for the add rule with no decay or one decay a head; see `_pallas_add_tpu`.

The delta rule and vector decays stay with `chunked`: their small triangular solves and (16, 16) tiles do not fill a TPU's
(128, 128) matrix unit, and no measurement says that a kernel would beat XLA there.

Status: numbers checked in interpret mode, programs lowered for a TPU; not compiled for one and not run on one.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array

from mlt_kernels import pallas
from mlt_kernels.linear_recurrence import NormalizedState, _pallas_add

LARGEST_STATE = 256 * 512
"""Elements of a state: with its cotangent, an anchor and their copies it must fit 16 MiB of fast memory."""


def unsupported(
    *,
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | None,
    beta: Array | None,
    rule: str,
    chunk_size: int,
    return_chunk_states: bool,
    **_: Any,
) -> str | None:
    if rule != "add":
        return f"there is no kernel for rule={rule!r}"
    if log_decay is not None and log_decay.ndim == 4:
        return "there is no kernel for a log_decay of every key dim"
    K, V = q.shape[-1], v.shape[-1]
    if K % 8 or V % 8:
        return f"K={K}, V={V}; a TPU's tiles have 8 rows"
    if K * V > LARGEST_STATE:
        return f"K={K}, V={V}; the kernels keep states of up to {LARGEST_STATE} elements in fast memory"
    for x in (q, k, v, log_decay, beta):
        if x is not None and x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{x.dtype} arguments; the kernels take float32 and bfloat16"
    if return_chunk_states and chunk_size < 8:
        return f"return_chunk_states with chunk_size={chunk_size}; a TPU's tiles have 8 rows"
    return pallas.unsupported_platform("tpu")


def run(
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
    initial_state: Array | NormalizedState | None,
    segment_ids: Array | None,
    chunk_size: int,
    return_final_state: bool,
    return_chunk_states: bool,
) -> Any:
    return _pallas_add.run(
        platform="tpu",
        q=q,
        k=k,
        v=v,
        log_decay=log_decay,
        beta=beta,
        rule=rule,
        log_input=log_input,
        normalizer=normalizer,
        scale=scale,
        initial_state=initial_state,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        return_final_state=return_final_state,
        return_chunk_states=return_chunk_states,
    )
