"""The selective scan: Mamba-1's recurrence, N states a channel, none of which is ever stored for every token."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from mlt_kernels import dispatch
from mlt_kernels.shapes import Shapes

OP = "selective_scan"


def selective_scan(
    x: Array,
    step: Array,
    A: Array,
    B: Array,
    C: Array,
    *,
    skip: Array | None = None,
    initial_state: Array | None = None,
    segment_ids: Array | None = None,
    return_final_state: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> Any:
    """Runs, for every batch row, channel d and state n,

        h_t[d, n] = exp(step_t[d] A[d, n]) h_{t-1}[d, n] + step_t[d] B_t[n] x_t[d]
        y_t[d]    = sum over n of C_t[n] h_t[d, n]  (+ skip[d] x_t[d])

    from zero at the start of every document. Padding (segment 0) leaves the state as it is and gives y = 0.

    Args:
      x: (B, T, D).
      step: (B, T, D), the step sizes after their softplus, usually at least 0.
      A: (D, N), usually negative; step * A is the log decay.
      B, C: (B, T, N), what a token writes and reads, shared by all channels.
      skip: (D,) or None.
      initial_state: (B, D, N), continues into the segment of token 0; None for zeros.
      segment_ids: (B, T) integer, 0 for padding.
      return_final_state: also return the state after the last token.
      implementation: see `mlt_kernels.dispatch`.

    Returns:
      y (B, T, D) in the dtype of x, or (y, final state (B, D, N)). Everything is computed, and the state kept, in
      float32 (float64 if any input is). All inputs are real: complex diagonals (S4D, S5) are `diagonal_recurrence`.

    Raises:
      ValueError, TypeError: a shape, dtype or option is wrong.
      UnsupportedError: the implementations asked for cannot run this call.

    Source: arXiv 2312.00752 (Mamba).
    """
    shapes = Shapes(OP)
    shapes.check("x", x, "B T D")
    shapes.check("step", step, "B T D")
    shapes.check("A", A, "D N")
    shapes.check("B", B, "B T N")
    shapes.check("C", C, "B T N")
    if 0 in (shapes["T"], shapes["N"]):
        raise ValueError(f"{OP}: x has shape {x.shape}, A {A.shape}; expected at least one token and one state")
    if skip is not None:
        shapes.check("skip", skip, "D")
    if initial_state is not None:
        shapes.check("initial_state", initial_state, "B D N")
    if segment_ids is not None:
        shapes.check("segment_ids", segment_ids, "B T", kind="integer")
    floats = [v.dtype for v in (x, step, A, B, C, skip, initial_state) if v is not None]
    arguments = {
        "x": x,
        "step": step,
        "A": A,
        "B": B,
        "C": C,
        "skip": skip,
        "initial_state": initial_state,
        "segment_ids": segment_ids,
        "state_dtype": jnp.result_type(jnp.float32, *floats),
    }
    y, final = dispatch.call(OP, implementation, arguments)
    return (y, final) if return_final_state else y
