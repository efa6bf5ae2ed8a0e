"""Softmax attention over packed documents, with grouped heads, windows, sinks and a differentiable log-sum-exp."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from mlt_kernels import dispatch
from mlt_kernels.shapes import Shapes

OP = "attention"

EMPTY_LSE = -1e30
"""The log-sum-exp of a query that sees nothing. Finite, so that arithmetic on it makes no NaN."""

Pair = tuple[Array | None, Array | None]


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = True,
    window: int | None = None,
    segment_ids: Array | tuple[Array, Array] | None = None,
    positions: Array | Pair | None = None,
    sinks: Array | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    bias: Array | None = None,
    return_lse: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> Any:
    """For query t and key s of one head:

        x_ts = softcap * tanh(scale * q_t . k_s / softcap) + bias_ts      without softcap: scale * q_t . k_s + bias_ts
        lse_t = log(sum over visible s of exp(x_ts) + exp(sink))          without sinks: no second term
        o_t = sum over visible s of exp(x_ts - lse_t) v_s

    Key s is visible to query t if all of these hold:

        segments    segment(s) == segment(t) and segment(s) != 0
        causal      position(s) <= position(t)
        window      position(t) - position(s) < window

    A query that sees no key gives o = 0 and lse = EMPTY_LSE (or the sink), with zero gradients.

    Positions. Documents are contiguous runs of a row, so that inside a document the order of row indices is the
    order of positions. Therefore self-attention (T == S, `positions` None or a single array) is ordered by row
    index, and a single `positions` array is not looked at. Explicit positions are for queries and keys that do not
    share a row: decoding from a cache, or the blocks of a sequence split over devices. Give a pair there; None in
    a pair, or None for T != S, stands for arange(S) for the keys and arange(T) + S - T for the queries.

    Args:
      q: (B, T, N, H).
      k: (B, S, K, H). K divides N; query head n reads key head n // (N / K).
      v: (B, S, K, P).
      causal: no key after the query.
      window: number of positions a query sees, its own included. Causal only.
      segment_ids: integers, 0 for padding and empty cache slots: (B, T) for both sides when T == S, or a pair
        (B, T), (B, S). None is one document without padding.
      positions: integers, as above: (B, T), or a pair of (B, T) or None and (B, S) or None.
      sinks: (N,) logits, not scaled, that take part in the sum and have no value (zeros: softmax off by one).
      softcap: positive number, or None.
      scale: number; None means H ** -0.5.
      bias: added to the capped scores; four dims, each 1 or that of (B, N, T, S).
      return_lse: also return lse, natural logarithm, with its true gradient.
      implementation: see `mlt_kernels.dispatch`.

    Returns:
      o (B, T, N, P) in the common dtype of q, k and v; with `return_lse` the pair (o, lse (B, T, N) float32).
      Scores, softmax and sums are float32 (float64 for float64 inputs).

    Raises:
      ValueError, TypeError: a shape, dtype or option is wrong.
      UnsupportedError: the implementations asked for cannot run this call.

    Sources: arXiv 2205.14135 (blockwise exact softmax), 2309.17453 (sinks), 2408.00118 (softcap).
    """
    shapes = Shapes(OP)
    shapes.check("q", q, "B T N H")
    shapes.check("k", k, "B S K H")
    shapes.check("v", v, "B S K P")
    shapes.divides("K", "N")
    if shapes["T"] == 0 or shapes["S"] == 0:
        raise ValueError(f"{OP}: q has shape {q.shape} and k {k.shape}; expected at least one query and one key")
    if window is not None:
        shapes.positive("window", window)
        if not causal:
            raise ValueError(f"{OP}: window={window} with causal=False; expected causal=True")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{OP}: softcap={softcap!r}; expected a positive number or None")
    if sinks is not None:
        shapes.check("sinks", sinks, "N")
    if bias is not None:
        _check_bias(shapes, bias)
    dtype = jnp.result_type(q, k, v)
    arguments = {
        "q": q.astype(dtype),
        "k": k.astype(dtype),
        "v": v.astype(dtype),
        "causal": causal,
        "window": window,
        "segment_ids": _segment_pair(shapes, segment_ids),
        "positions": _position_pair(shapes, positions),
        "sinks": sinks,
        "softcap": None if softcap is None else float(softcap),
        "scale": float(shapes["H"] ** -0.5 if scale is None else scale),
        "bias": bias,
        "return_lse": return_lse,
    }
    return dispatch.call(OP, implementation, arguments)


def merge(partials: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Merges attention over disjoint sets of keys into attention over their union:

        lse = log(sum_i exp(lse_i))      o = sum_i exp(lse_i - lse) o_i

    Exact and differentiable, since `attention` gives the true gradient of its lse. Sinks, if any, belong to one
    partial only. To merge one partial after another without rounding to bfloat16 each time, keep the first in
    float32: the result has the widest dtype among the partial outputs.

    Args:
      partials: at least one pair of o (B, T, N, P) and lse (B, T, N), as `attention` returns them.

    Returns:
      (o, lse) of the union.
    """
    if not partials:
        raise ValueError(f"{OP}.merge: no partial results; expected at least one (o, lse)")
    dtype = jnp.result_type(*(o for o, _ in partials))
    wide = jnp.result_type(jnp.float32, *(lse for _, lse in partials))
    lses = [lse.astype(wide) for _, lse in partials]
    lse_BTN = lses[0]
    for other in lses[1:]:
        lse_BTN = jnp.logaddexp(lse_BTN, other)
    o_BTNP = jnp.zeros_like(partials[0][0], wide)
    for (o, _), lse in zip(partials, lses, strict=True):
        o_BTNP += jnp.exp(lse - lse_BTN)[..., None] * o
    return o_BTNP.astype(dtype), lse_BTN


def _segment_pair(shapes: Shapes, segment_ids: Any) -> tuple[Array, Array] | None:
    if segment_ids is None:
        return None
    if isinstance(segment_ids, (tuple, list)):
        queries, keys = _two("segment_ids", segment_ids)
    else:
        queries = keys = _shared(shapes, "segment_ids", segment_ids)
    shapes.check("segment_ids of the queries", queries, "B T", kind="integer")
    shapes.check("segment_ids of the keys", keys, "B S", kind="integer")
    return queries, keys


def _position_pair(shapes: Shapes, positions: Any) -> Pair | None:
    """A pair of explicit positions, or None where the order is that of the rows."""
    if positions is None:
        return None
    if not isinstance(positions, (tuple, list)):
        shapes.check("positions", _shared(shapes, "positions", positions), "B T", kind="integer")
        return None
    queries, keys = _two("positions", positions)
    if queries is not None:
        shapes.check("positions of the queries", queries, "B T", kind="integer")
    if keys is not None:
        shapes.check("positions of the keys", keys, "B S", kind="integer")
    return None if queries is None and keys is None else (queries, keys)


def _shared(shapes: Shapes, name: str, array: Any) -> Any:
    if shapes["T"] != shapes["S"]:
        raise ValueError(
            f"{OP}: one {name} array with T={shapes['T']} queries and S={shapes['S']} keys; "
            f"expected a pair, (B, T) of the queries and (B, S) of the keys"
        )
    return array


def _two(name: str, pair: Sequence[Any]) -> tuple[Any, Any]:
    if len(pair) != 2:
        raise ValueError(f"{OP}: {name} has {len(pair)} entries; expected two, of the queries and of the keys")
    return pair[0], pair[1]


def _check_bias(shapes: Shapes, bias: Array) -> None:
    shapes.check_dtype("bias", bias, "floating")
    full = tuple(shapes[letter] for letter in "BNTS")
    if len(bias.shape) != 4 or any(size not in (1, whole) for size, whole in zip(bias.shape, full, strict=True)):
        raise ValueError(f"{OP}: bias has shape {tuple(bias.shape)}; expected four dims, each 1 or that of {full}")
