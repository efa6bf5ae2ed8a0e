"""tokamax's attention on Hopper and Blackwell GPUs (Mosaic GPU): causal, windows, packed documents and soft cap, no mask array.

What a query sees is a range of keys: documents are contiguous runs of a row, so that segment ids, a window and the causal
order are each a first and a last key. Blocks outside the ranges are skipped. A query that sees nothing (padding, or a query
before the first key) is given a range all the same and its output is dropped: a zero, and zero gradients.

The log-sum-exp comes without a gradient, the gradient of a bias as a (B, N, T, S) array: both are refused.

Status: ranges and gradients checked through tokamax's own portable form of the same call, programs lowered for cuda; not run on
a GPU.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from mlt_kernels import tokamax_calls
from mlt_kernels.attention import Pair

MOST_DIM = 256
"""Numbers of a key or value; more do not fit a Hopper GPU's shared memory."""


def unsupported(
    *,
    q: Array,
    k: Array,
    v: Array,
    causal: bool,
    window: int | None,
    segment_ids: tuple[Array, Array] | None,
    positions: Pair | None,
    sinks: Array | None,
    softcap: float | None,
    scale: float,
    bias: Array | None,
    return_lse: bool,
) -> str | None:
    reason = tokamax_calls.unsupported(q.dtype)
    if reason:
        return reason
    if return_lse:
        return "its log-sum-exp has no gradient"
    if sinks is not None:
        return "tokamax has no sinks"
    if bias is not None:
        return "a bias, whose gradient tokamax makes as a whole (B, N, T, S) array"
    if max(q.shape[3], v.shape[3]) > MOST_DIM:
        return f"keys of {q.shape[3]} numbers and values of {v.shape[3]}; its kernels hold at most {MOST_DIM}"
    if causal and positions is not None:
        return "explicit positions; its causal order is that of the rows"
    if segment_ids is not None and segment_ids[0] is not segment_ids[1]:
        return "segment_ids of queries and keys that do not share a row; a query's keys must be one range"

    def fn(q: Array, k: Array, v: Array, segments: Any) -> Array:
        return _attention(q, k, v, segments, causal, window, softcap, scale)

    return tokamax_calls.refused(fn, (q, k, v), None if segment_ids is None else segment_ids[0])


def run(
    *,
    q: Array,
    k: Array,
    v: Array,
    causal: bool,
    window: int | None,
    segment_ids: tuple[Array, Array] | None,
    positions: Pair | None,
    sinks: Array | None,
    softcap: float | None,
    scale: float,
    bias: Array | None,
    return_lse: bool,
) -> Array:
    del positions, sinks, bias, return_lse
    return _attention(q, k, v, None if segment_ids is None else segment_ids[0], causal, window, softcap, scale)


def _attention(
    q: Array, k: Array, v: Array, segments_BT: Any, causal: bool, window: int | None, softcap: float | None, scale: float
) -> Array:
    T, S = q.shape[1], k.shape[1]
    first, end, blind = _ranges(T, S, causal, window, segments_BT)
    # Its own causal order, where it has the same meaning, skips blocks without reading ranges.
    own_order = causal and T == S
    o_BTNP = tokamax_calls.attention(
        q, k, v, scale=scale, softcap=softcap, causal=own_order, first=first, end=None if own_order else end
    )
    return o_BTNP if blind is None else jnp.where(blind[..., None, None], jnp.zeros((), o_BTNP.dtype), o_BTNP)


def _ranges(T: int, S: int, causal: bool, window: int | None, segments_BT: Any) -> tuple[Any, Any, Any]:
    """First key and end of each query's range and whether it sees nothing, (B or 1, T) each; None where all see all of it."""
    at_T = jnp.arange(T, dtype=jnp.int32)[None]
    first = end = blind = None
    if segments_BT is not None:
        changed_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
        edge_B1 = jnp.ones_like(segments_BT[:, :1], bool)
        opens, closes = (jnp.concatenate(x, axis=1) for x in ([edge_B1, changed_BT], [changed_BT, edge_B1]))
        first = lax.cummax(jnp.where(opens, at_T, 0), axis=1)
        end = lax.cummin(jnp.where(closes, at_T + 1, T), axis=1, reverse=True)
        # Padding is a run like another, so that no token sees it; what it saw itself is dropped.
        blind = segments_BT == 0
    if causal:
        last = at_T + S - T
        end = last + 1 if end is None else jnp.minimum(end, last + 1)
        if window is not None:
            least = last + 1 - window
            first = jnp.maximum(least, 0) if first is None else jnp.maximum(first, least)
        if T > S:
            blind = last < 0
            end = jnp.maximum(end, 1)
    return first, end, blind
