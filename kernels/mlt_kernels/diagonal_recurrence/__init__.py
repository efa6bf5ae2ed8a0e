"""Elementwise linear recurrences: the op behind Mamba-1, RG-LRU, S4D, S5 and LMU."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from mlt_kernels import dispatch
from mlt_kernels.shapes import Shapes

OP = "diagonal_recurrence"


def diagonal_recurrence(
    a: Array,
    b: Array,
    *,
    initial_state: Array | None = None,
    segment_ids: Array | None = None,
    reverse: bool = False,
    return_final_state: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> Any:
    """Runs, for every batch row and channel,

        h_t = a_t * h_{t-1} + b_t

    from zero at the start of every document. Padding (segment 0) leaves the state as it is.

    Args:
      a: (B, T, ...) real or complex, usually |a| <= 1.
      b: (B, T, ...), the shape of a.
      initial_state: (B, ...), continues into the segment of token 0 (of the last token in reverse); None for zeros.
      segment_ids: (B, T) integer, 0 for padding.
      reverse: run from the last token to the first: h_t = a_t * h_{t+1} + b_t.
      return_final_state: also return the state after the last token run over.
      implementation: see `mlt_kernels.dispatch`.

    Returns:
      h (B, T, ...) in the common dtype of a and b, or (h, final state (B, ...)). States are float32 or complex64
      (float64 or complex128 if any input is).

    Raises:
      ValueError, TypeError: a shape, dtype or option is wrong.
      UnsupportedError: the implementations asked for cannot run this call.

    Sources: arXiv 2312.00752 (Mamba), 2402.19427 (RG-LRU), 2206.11893 (S4D), 2208.04933 (S5).
    """
    shapes, kinds = Shapes(OP), ("floating", "complex")
    shapes.check("a", a, "B T ...", kind=kinds)
    shapes.check("b", b, "B T ...", kind=kinds)
    if a.shape != b.shape:
        raise ValueError(f"{OP}: b has shape {b.shape}; expected that of a, {a.shape}")
    if shapes["T"] == 0:
        raise ValueError(f"{OP}: a has shape {a.shape}; expected at least one token")
    if segment_ids is not None:
        shapes.check("segment_ids", segment_ids, "B T", kind="integer")
    if initial_state is not None:
        shapes.check_dtype("initial_state", initial_state, kinds)
        expected = (a.shape[0], *a.shape[2:])
        if initial_state.shape != expected:
            raise ValueError(f"{OP}: initial_state has shape {initial_state.shape}; expected {expected}")
    states = [x.dtype for x in (a, b, initial_state) if x is not None]
    arguments = {
        "a": a,
        "b": b,
        "initial_state": initial_state,
        "segment_ids": segment_ids,
        "reverse": reverse,
        "state_dtype": jnp.result_type(jnp.float32, *states),
    }
    h, final = dispatch.call(OP, implementation, arguments)
    h = h.astype(jnp.result_type(a, b))
    return (h, final) if return_final_state else h
