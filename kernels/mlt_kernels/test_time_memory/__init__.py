"""Memories that learn at test time: the op behind TTT, Titans, LaCT, Miras (Moneta, Yaad, Memora), OmegaNet's c = 1, TNT.

No hardware backend: a step of the scan is a handful of batched matrix products, which XLA already runs near peak.
"""

# ruff: noqa: PT028 (the name of the op is not that of a test)

import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from mlt_kernels import dispatch
from mlt_kernels.shapes import Shapes
from mlt_kernels.test_time_memory._network import accumulator
from mlt_kernels.test_time_memory._spec import (
    LM_NEWTON_SCHULZ,
    MUON_NEWTON_SCHULZ,
    MemorySpec,
    MemoryState,
    copies,
    kept,
    options,
    started,
)

__all__ = [
    "LM_NEWTON_SCHULZ",
    "MUON_NEWTON_SCHULZ",
    "MemorySpec",
    "MemoryState",
    "copies",
    "empty_state",
    "initial_state",
    "test_time_memory",
]

OP = "test_time_memory"


def test_time_memory(
    q: Array,
    k: Array,
    v: Array,
    memory: Sequence[Array],
    *,
    spec: MemorySpec,
    step: Array,
    log_decay: Array | None = None,
    log_momentum: Array | None = None,
    threshold: Array | None = None,
    row_weight: Array | None = None,
    norm_scale: Array | None = None,
    norm_bias: Array | None = None,
    initial_state: MemoryState | None = None,
    segment_ids: Array | None = None,
    return_final_state: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> Any:
    """Trains, per batch row and head, the weights W of a small network f on pairs (k_t, v_t) and answers f(q_t).

    A document is cut into chunks of C tokens from its own start. Within a chunk every gradient is taken at W_0, the weights
    that entered it, whatever else the chunk has written: g_t = d loss(f_{W_0}(k_t), v_t) / dW. With the gates
    theta_t = step, a_t = exp(log_decay), m_t = exp(log_momentum), i = 1..C the place of t in its chunk:

        "descent"    A_t = a_t A_{t-1} - theta_t g_t                                         (Miras, OmegaNet c = 1, TNT)
        "momentum"   S_t = m_t S_{t-1} - theta_t g_t,   A_t = a_t A_{t-1} + S_t              (Titans)
        "mean"       S_t = S_{t-1} - theta_t g_t,       A_t = A_0 + tau_i S_t                (TTT; tau = row_weight)
        "chunk"      S   = -sum theta_t g_t over the chunk, + mean(m_t) S of the chunk before;
                     A   = rows(A_0 + newton_schulz(S))   at its end                         (LaCT)

    W = link(A) (`MemorySpec.link`), and the gradient is with respect to W. A token reads W_t, after its own write
    (read "token"), where a link that scales keeps the scale it had at W_0; or W_0 (read "chunk"). With C = 1 every rule is
    plain online learning. C is part of the model: gradients frozen at W_0 are other gradients. Steps have a bound that falls
    with C: |1 - 2 C theta| < 1 for C equal unit keys, a linear memory and |r|^2.

    The memory is the initial one before every document, and after every `reset_every` tokens of one. Padding (segment 0)
    leaves it as it is.

    Args:
      q, k: (B, T, H, K).
      v: (B, T, H, V); V = K with a residual.
      memory: the initial matrices, each (H, a, b), applied as x W, first to last ("gated": gate, up, down); with
        `spec.bias` a is one more than the width it takes and the last row is the bias. Under link "softmax" and "mirror" they
        are the accumulators, otherwise the weights.
      spec: what the memory is.
      step: theta >= 0, (B, T, H), or (B, T, H, L) with one for each of the L matrices.
      log_decay: <= 0, (B, T, H); None keeps everything. Rules "descent" and "momentum".
      log_momentum: <= 0, (B, T, H). Rule "momentum", or "chunk" where None means no momentum.
      threshold: > 0, (B, T, H), of the Huber losses.
      row_weight: (C,), tau; None means 1 / i. Rule "mean".
      norm_scale, norm_bias: (H, V), of the layer norm; None for 1 and 0.
      initial_state: goes on into the document of token 0, in the middle of its chunk if it stopped there.
      segment_ids: (B, T) integer, 0 for padding.
      return_final_state: also return the state after the last token.
      implementation: see `mlt_kernels.dispatch`.

    Returns:
      o (B, T, H, V) in the dtype of v, 0 at padding; or (o, MemoryState). Matrix products, states, gates, losses, norms and
      links are float32 (float64 if any input is), whatever the dtype of q, k and v; for those of 16 bits accelerators make a
      product of three of 16-bit operands, at least 16 of float32's 24 digits.

    Raises:
      ValueError, TypeError: a shape, dtype or option is wrong.
      UnsupportedError: the implementations asked for cannot run this call.

    Sources: arXiv 2407.04620 (TTT), 2501.00663 (Titans), 2505.23884 (LaCT), 2504.13173 (Miras), 2505.23735 (OmegaNet),
    2511.07343 (TNT).
    """
    shapes = Shapes(OP)
    shapes.check("q", q, "B T H K")
    shapes.check("k", k, "B T H K")
    shapes.check("v", v, "B T H V")
    if shapes["T"] == 0:
        raise ValueError(f"{OP}: q has shape {q.shape}; expected at least one token")
    memory = tuple(memory)
    _check_memory(shapes, memory, spec)
    dims = {3: "B T H"}.get(getattr(step, "ndim", 4), f"B T H {len(memory)}")
    shapes.check("step", step, dims)
    gates = {"log_decay": log_decay, "log_momentum": log_momentum, "threshold": threshold, "row_weight": row_weight}
    gates |= {"norm_scale": norm_scale, "norm_bias": norm_bias}
    dims = {"row_weight": str(spec.chunk_size), "norm_scale": "H V", "norm_bias": "H V"}
    for name, use in options(spec).items():
        if gates[name] is None:
            if use == "required":
                raise ValueError(f"{OP}: {name}=None; expected an array with rule={spec.rule!r} and loss={spec.loss!r}")
            continue
        if use == "none":
            raise ValueError(
                f"{OP}: {name} with rule={spec.rule!r}, loss={spec.loss!r}, layer_norm={spec.layer_norm}; expected None"
            )
        shapes.check(name, gates[name], dims.get(name, "B T H"))
    if segment_ids is not None:
        shapes.check("segment_ids", segment_ids, "B T", kind="integer")
    _check_state(shapes, initial_state, memory, spec, log_momentum is not None)

    wide = jnp.result_type(jnp.float32, *(x for x in (q, k, v, *memory, step, *gates.values()) if x is not None))
    norm = None
    if spec.layer_norm:
        ones = jnp.ones((shapes["H"], shapes["V"]), wide)
        norm = (
            ones if norm_scale is None else norm_scale.astype(wide),
            0 * ones if norm_bias is None else norm_bias.astype(wide),
        )
    tau = None
    if spec.rule == "mean":
        tau = 1 / jnp.arange(1, spec.chunk_size + 1, dtype=wide) if row_weight is None else row_weight.astype(wide)
    step_BTHL = step if step.ndim == 4 else step[..., None]
    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "memory": tuple(accumulator(spec, w.astype(wide)) for w in memory),
        "spec": spec,
        "step": jnp.broadcast_to(step_BTHL.astype(wide), (*q.shape[:3], len(memory))),
        "log_decay": None if log_decay is None else log_decay.astype(wide),
        "log_momentum": None if log_momentum is None else log_momentum.astype(wide),
        "threshold": None if threshold is None else threshold.astype(wide),
        "row_weight": tau,
        "norm": norm,
        "initial_state": initial_state,
        "segment_ids": segment_ids,
        "return_final_state": return_final_state,
    }
    return dispatch.call(OP, implementation, arguments)


def initial_state(memory: Sequence[Array], spec: MemorySpec, batch: int, *, momentum: bool = False) -> MemoryState:
    """The state before a document: as `initial_state` of the op it changes nothing. float32 (float64 if the memory is).

    Args:
      memory: the initial matrices, each (H, a, b).
      momentum: whether a memory of rule "chunk" is called with `log_momentum`.
    """
    weights = []
    for w in memory:
        a = accumulator(spec, w.astype(jnp.result_type(jnp.float32, w)))
        weights.append(jnp.broadcast_to(a, (batch, *a.shape)))
    return started(tuple(weights), spec, momentum)


def empty_state(
    shapes: Sequence[tuple[int, int, int]], spec: MemorySpec, batch: int, *, momentum: bool = False, dtype: Any = jnp.float32
) -> MemoryState:
    """Zeros in the place of a state, for matrices of these shapes (H, a, b): a buffer to decode into."""
    return started(tuple(jnp.zeros((batch, *shape), dtype) for shape in shapes), spec, momentum)


def _check_memory(shapes: Shapes, memory: tuple[Array, ...], spec: MemorySpec) -> None:
    wanted = {"linear": (1, 1), "mlp": (2, None), "gated": (3, 3)}[spec.net]
    if len(memory) < wanted[0] or (wanted[1] is not None and len(memory) > wanted[1]):
        count = f"{wanted[0]}" if wanted[1] else f"at least {wanted[0]}"
        raise ValueError(f"{OP}: memory has {len(memory)} matrices; expected {count} with net={spec.net!r}")
    row = int(spec.bias)
    for level, w in enumerate(memory):
        shapes.check(f"memory[{level}]", w, "H ...")
        if w.ndim != 3:
            raise ValueError(f"{OP}: memory[{level}] has shape {w.shape}; expected (H, a, b)")
    if spec.net == "gated":
        widths = [shapes["K"], memory[0].shape[2], shapes["V"]]
        expected = [(widths[0] + row, widths[1]), (widths[0] + row, widths[1]), (widths[1] + row, widths[2])]
    else:
        widths = [shapes["K"], *(w.shape[2] for w in memory[:-1]), shapes["V"]]
        expected = [(a + row, b) for a, b in itertools.pairwise(widths)]
    for level, (w, (a, b)) in enumerate(zip(memory, expected, strict=True)):
        if w.shape[1:] != (a, b):
            raise ValueError(f"{OP}: memory[{level}] has shape {w.shape}; expected ({shapes['H']}, {a}, {b})")
    if spec.residual and shapes["K"] != shapes["V"]:
        raise ValueError(f"{OP}: residual with K={shapes['K']} and V={shapes['V']}; expected K = V")


def _check_state(shapes: Shapes, state: MemoryState | None, memory: tuple[Array, ...], spec: MemorySpec, momentum: bool) -> None:
    if state is None:
        return
    if not isinstance(state, MemoryState):
        raise TypeError(f"{OP}: initial_state must be a MemoryState, got {type(state).__name__}")
    parts = {"weights": True, **kept(spec, momentum)}
    for name, present in parts.items():
        found = getattr(state, name)
        if len(found) != (len(memory) if present else 0):
            raise ValueError(f"{OP}: initial_state.{name} has {len(found)} matrices; expected {len(memory) if present else 0}")
        for level, (w, a) in enumerate(zip(memory, found, strict=False)):
            shapes.check(f"initial_state.{name}[{level}]", a, f"B H {w.shape[1]} {w.shape[2]}")
    if parts["previous"]:
        shapes.check("initial_state.gate_sum", state.gate_sum, "B H")
    shapes.check("initial_state.position", state.position, "B", kind="integer")
