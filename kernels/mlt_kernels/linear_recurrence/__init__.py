"""Matrix-state linear recurrences: the op behind SSD, RetNet, GLA, DeltaNet, gated delta, KDA and mLSTM."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array

from mlt_kernels import dispatch
from mlt_kernels.shapes import Shapes

OP = "linear_recurrence"
RULES = ("add", "delta")
NORMALIZERS = ("none", "mlstm", "sum")


class NormalizedState(NamedTuple):
    """State of a normalised recurrence, all float32; the true sums are exp(log_scale) times what is stored."""

    value: Array  # (B, H, K, V)
    key_sum: Array  # (B, H, K): the same recurrence with v = 1
    log_scale: Array  # (B, H)


def linear_recurrence(
    q: Array,
    k: Array,
    v: Array,
    *,
    log_decay: Array | None = None,
    beta: Array | None = None,
    rule: Literal["add", "delta"] = "add",
    log_input: Array | None = None,
    normalizer: Literal["none", "mlstm", "sum"] = "none",
    scale: float | None = None,
    initial_state: Array | NormalizedState | None = None,
    segment_ids: Array | None = None,
    chunk_size: int = 64,
    return_final_state: bool = False,
    return_chunk_states: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> Any:
    """Runs, per batch row and value head, with a state S of shape (K, V):

        S_t = diag(exp(g_t)) S_{t-1}
        u_t = v_t                    rule "add"
        u_t = v_t - S_t^T k_t        rule "delta", on the state already decayed
        S_t = S_t + beta_t exp(i_t) k_t u_t^T
        o_t = S_t^T (scale q_t)      reads the state after the write

    The state is zero before every document. Padding (segment 0) leaves the state as it is and gives o = 0, so the
    final state of a padded row is that of the row without padding.

    With `normalizer`, n_t is the same recurrence with v = 1 and

        "sum":    o_t = S_t^T q_t / (n_t . q_t)
        "mlstm":  o_t = S_t^T q_t / max(|n_t . q_t|, 1)        q already scaled

    both computed with a running maximum taken out of exp, so that `log_input` may be large.

    Args:
      q, k: (B, T, Hk, K). Hk divides H; value head h reads query/key head h // (H / Hk).
      v: (B, T, H, V).
      log_decay: g <= 0, float32, (B, T, H), (B, T, H, K), one constant a head (H,), or None for no decay.
      beta: (B, T, H) write strength, None for 1.
      rule: "add" or "delta". For "delta", keys should have norm at most 1 and beta lie in [0, 2].
      log_input: i, float32 (B, T, H), None for 0. Rule "add" only.
      normalizer: "none", "mlstm" or "sum". Other than "none": rule "add" only.
      scale: of the queries; None means K ** -0.5.
      initial_state: float32 (B, H, K, V), or a `NormalizedState` when normalised; continues into the segment of
        token 0.
      segment_ids: (B, T) integer, 0 for padding.
      chunk_size: tokens a chunk, a power of two. The result does not depend on it beyond rounding.
      return_final_state: also return the state after the last token.
      return_chunk_states: also return the states that enter each chunk, (B, ceil(T / chunk_size), H, K, V) float32.
        Not with a normalizer.
      implementation: see `mlt_kernels.dispatch`.

    Returns:
      o (B, T, H, V) in the dtype of v, or a tuple (o, final state?, chunk states?) when a flag is set.
      Gates, cumulative sums, solves and states are float32 (float64 if any input is).

    Raises:
      ValueError, TypeError: a shape, dtype or option is wrong.
      UnsupportedError: the implementations asked for cannot run this call.

    Sources: arXiv 2405.21060 (SSD), 2312.06635 (GLA), 2406.06484 (DeltaNet), 2412.06464 (gated delta),
    2510.26692 (KDA), 2405.04517 (mLSTM).
    """
    shapes = Shapes(OP)
    shapes.check("q", q, "B T Hk K")
    shapes.check("k", k, "B T Hk K")
    shapes.check("v", v, "B T H V")
    shapes.divides("Hk", "H")
    shapes.option("rule", rule, RULES)
    shapes.option("normalizer", normalizer, NORMALIZERS)
    shapes.positive("chunk_size", chunk_size)
    if scale is not None and not isinstance(scale, int | float):
        raise TypeError(f"{OP}: scale must be None or a Python number, got {type(scale).__name__}")
    if chunk_size & (chunk_size - 1):
        raise ValueError(f"{OP}: chunk_size={chunk_size}; expected a power of two")
    if shapes["T"] == 0:
        raise ValueError(f"{OP}: q has shape {q.shape}; expected at least one token")
    if log_decay is not None:
        dims = {1: "H", 3: "B T H"}.get(getattr(log_decay, "ndim", 4), "B T H K")
        shapes.check("log_decay", log_decay, dims)
    for name, gate in (("beta", beta), ("log_input", log_input)):
        if gate is not None:
            shapes.check(name, gate, "B T H")
    if segment_ids is not None:
        shapes.check("segment_ids", segment_ids, "B T", kind="integer")
    _check_combination(rule, normalizer, log_decay, log_input, return_chunk_states)
    _check_state(shapes, initial_state, normalizer)

    wide = jnp.result_type(jnp.float32, *(x for x in (q, k, v, log_decay, beta) if x is not None))
    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "log_decay": None if log_decay is None else log_decay.astype(wide),
        "beta": None if beta is None else beta.astype(wide),
        "rule": rule,
        "log_input": None if log_input is None else log_input.astype(wide),
        "normalizer": normalizer,
        "scale": float(shapes["K"] ** -0.5 if scale is None else scale),
        "initial_state": initial_state,
        "segment_ids": segment_ids,
        "chunk_size": chunk_size,
        "return_final_state": return_final_state,
        "return_chunk_states": return_chunk_states,
    }
    return dispatch.call(OP, implementation, arguments)


def _check_combination(
    rule: str, normalizer: str, log_decay: Array | None, log_input: Array | None, return_chunk_states: bool
) -> None:
    if rule == "delta" and normalizer != "none":
        raise ValueError(f"{OP}: normalizer={normalizer!r} with rule='delta'; expected rule='add'")
    if rule == "delta" and log_input is not None:
        raise ValueError(f"{OP}: log_input with rule='delta'; expected None (put the gate into beta)")
    if normalizer != "none" and log_decay is not None and log_decay.ndim == 4:
        raise ValueError(f"{OP}: normalizer={normalizer!r} with log_decay of shape {log_decay.shape}; expected (B, T, H) or (H,)")
    if return_chunk_states and normalizer != "none":
        raise ValueError(f"{OP}: return_chunk_states with normalizer={normalizer!r}; expected normalizer='none'")


def _check_state(shapes: Shapes, state: Array | NormalizedState | None, normalizer: str) -> None:
    if state is None:
        return
    if normalizer == "none":
        shapes.check("initial_state", state, "B H K V")
        return
    if not isinstance(state, NormalizedState):
        raise TypeError(
            f"{OP}: initial_state must be a NormalizedState with normalizer={normalizer!r}, got {type(state).__name__}"
        )
    shapes.check("initial_state.value", state.value, "B H K V")
    shapes.check("initial_state.key_sum", state.key_sum, "B H K")
    shapes.check("initial_state.log_scale", state.log_scale, "B H")
