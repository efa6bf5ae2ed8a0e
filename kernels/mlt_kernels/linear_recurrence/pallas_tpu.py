"""TPU kernels in Pallas: `_pallas_add_tpu` and `_pallas_delta_tpu` for no decay or one a head, `_pallas_vector_tpu` for one a key
dim, under both rules.

Status: numbers checked in interpret mode, programs compiled for TPU v4 to v6e (`tools/compile_tpu.py`); not run on one.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array

from mlt_kernels import pallas
from mlt_kernels.linear_recurrence import _pallas_add, reference

LARGEST_STATE = 256 * 512
"""Elements of a state: with its cotangent, an anchor and their copies it must fit 16 MiB of fast memory."""

LARGEST = 512
"""Key or value dim: the tiles of (128, K) and (128, V) must fit beside the state."""
LARGEST_KEY = 256
"""Key dim with one decay a key dim, whose kernels hold some twenty tiles of (128, K)."""


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
    if 0 in v.shape:
        return f"v has shape {v.shape}: nothing to compute"
    if K % 8 or V % 8:
        return f"K={K}, V={V}; a TPU's tiles have 8 rows"
    if max(K, V) > LARGEST:
        return f"K={K}, V={V}; the kernels take dims of up to {LARGEST}, whose tiles fit fast memory"
    if K * V > LARGEST_STATE:
        return f"K={K}, V={V}; the kernels keep states of up to {LARGEST_STATE} elements in fast memory"
    if log_decay is not None and log_decay.ndim == 4 and K > LARGEST_KEY:
        return f"K={K} with a log_decay of every key dim; the kernels keep its sums for K up to {LARGEST_KEY} in fast memory"
    for x in (q, k, v, log_decay, beta):
        if x is not None and x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{x.dtype} arguments; the kernels take float32 and bfloat16"
    if return_chunk_states and chunk_size < 8:
        return f"return_chunk_states with chunk_size={chunk_size}; a TPU's tiles have 8 rows"
    return pallas.unsupported_platform("tpu")


@functools.wraps(reference.run)  # for its signature, the same of every backend
def run(**arguments: Any) -> Any:
    return _pallas_add.run(platform="tpu", **arguments)
