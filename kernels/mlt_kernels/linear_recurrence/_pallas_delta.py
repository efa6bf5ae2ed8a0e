"""Delta rule on a GPU: DeltaNet, gated delta (no, constant or scalar decay) and KDA (vector decay), forward and backward.

Status: not run on a GPU. Numbers are checked in interpret mode against float64, programs lowered for `cuda` and compiled
for an H200 on a host without one.

Forward: `_pallas_delta_solve` inverts each chunk's triangular matrix, all chunks at once, and `_pallas_delta_run` goes
through the chunks with the state in registers. The backward pass always recomputes the states that enter the chunks, one
more pass over k, v and the inverse, and so keeps only the inverses beside the inputs: C numbers a token and head in
float32 or three parts of bfloat16 (with a vector decay also as many scores; float32 operands, the overlaps too). The
states, K V / C numbers a token and head, live inside the backward pass only. Then run the *reverse* and *local* kernels
of `_pallas_delta_back` and, under a vector decay, that of `_pallas_delta_vector`. Every gradient is written out here; the
last state, the initial state and the chunk states are differentiable.

Compiled for an H200 with K = V = 128 in bfloat16, all products of the sweeps are `wgmma`; `ptxas -v` (CUDA 13.0, jaxlib
0.10.2) on the dumped PTX counts this many bytes of registers spilled a thread (2026-11-30): solve 0, run 72 (0 where it
keeps the states), reverse 20, local 1404; under a vector decay solve 1732, run 1160 (672), reverse 488, last kernel 0,
local 2340 with slices of 64 columns and not measured with 32. What that costs has not been measured. A row with fewer
than 2 x 132 heads and slices of V in all does not fill the card: rows are not cut into pieces.

Letters: see `_pallas_delta_chunk`. Sums of decays are made here, in XLA: two float32 numbers for each decay.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mlt_kernels import pallas, segments, tuned
from mlt_kernels.linear_recurrence._pallas_delta_back import backward
from mlt_kernels.linear_recurrence._pallas_delta_chunk import LOWEST, Plan, sums
from mlt_kernels.linear_recurrence._pallas_delta_run import forward
from mlt_kernels.linear_recurrence._pallas_delta_solve import solve

SIZES = (16, 32, 64, 128, 256)


def launch(device: str, decay: str, K: int, low: Any) -> dict[str, int]:
    """Chunk, columns of V, warps and stages of the kernels: this rule's, or but for the chunk those measured on the device.

    Bfloat16: chunks of 64, whose tiles reach `wgmma` on Hopper. With one decay a head *run* spills 72 bytes a thread with 32
    columns of V, 252 with 64; one stage spills least in the *local* kernel. Float32 products use ordinary arithmetic: chunks of
    32 cost less of it, and where keys repeat they lose four times less to rounding.
    """
    full = low == jnp.float32
    warps = 8 if decay == "vector" else 4
    rule = {
        "value_block": 64 if decay == "vector" and K <= 128 and not full else 32,
        "sweep_warps": warps,
        "solve_warps": warps,
        "tile_warps": 8,
        "sweep_stages": 1 if decay == "vector" and K > 128 else 2,  # two would not fit in shared memory
        "tile_stages": 1,
    }
    shape = {"K": K, "decay": decay, "item_bytes": jnp.dtype(low).itemsize}
    return {"C": 32 if full else 64} | tuned.sizes("linear_recurrence", "pallas_gpu", "delta", shape, rule, device=device)


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
    """Why these arguments of the delta rule cannot run, or None; of the platform the caller asks."""
    K, V = q.shape[3], v.shape[3]
    wide = [x.dtype for x in (q, k, v, log_decay, beta) if x is not None]
    if any(dtype not in (jnp.bfloat16, jnp.float32) for dtype in wide):
        return f"operands are bfloat16 or float32, gates float32; got {', '.join(sorted({str(d) for d in wide}))}"
    if K not in SIZES or V not in SIZES:
        return f"K={K}, V={V}; tiles are powers of two from 16 to 256 (others would have to be padded, at the cost of traffic)"
    C = launch(pallas.device_kind(), _decay(log_decay), K, jnp.result_type(q, k, v))["C"]
    if return_chunk_states and chunk_size % C:
        return f"return_chunk_states with chunk_size={chunk_size}; it has states at multiples of {C} tokens"
    return None


def run(
    *,
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | None,
    beta: Array | None,
    scale: float,
    initial_state: Array | None,
    segment_ids: Array | None,
    chunk_size: int,
    return_final_state: bool,
    return_chunk_states: bool,
    **_: Any,
) -> Any:
    """`linear_recurrence` with rule="delta"."""
    B, T, H, V = v.shape
    K, low = q.shape[3], jnp.result_type(q, k, v)
    decay = _decay(log_decay)
    if decay == "vector":
        q, k = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (q, k))
    chosen = launch(pallas.device_kind(), decay, K, low)
    C = chosen["C"]
    padded = -(-T // C) * C
    plan = Plan(
        B=B,
        T=padded,
        H=H,
        Hk=q.shape[2],
        K=K,
        V=V,
        decay=decay,
        scale=scale,
        low=low,
        interpret=pallas.interpreting(),
        states=return_chunk_states,
        **(chosen | {"value_block": min(V, chosen["value_block"])}),
    )

    def whole(x: Array) -> Array:
        """(B, T, ...) to a whole number of chunks, with zeros."""
        return jnp.pad(x, [(0, 0), (0, padded - T)] + [(0, 0)] * (x.ndim - 2)) if padded > T else x

    def real(gate: Array) -> Array:
        """0 at padding: it decays nothing and writes nothing."""
        if segment_ids is None:
            return gate
        return jnp.where((segment_ids != 0).reshape(B, T, *[1] * (gate.ndim - 2)), gate, 0)

    g = None
    if log_decay is not None:
        log_decay = jnp.broadcast_to(jnp.maximum(log_decay, LOWEST), (B, T, H, *log_decay.shape[3:]))
        g = whole(real(log_decay.astype(jnp.float32)))
    beta = jnp.ones((B, T, H), jnp.float32) if beta is None else beta.astype(jnp.float32)
    state = jnp.zeros((B, H, K, V), jnp.float32) if initial_state is None else initial_state.astype(jnp.float32)
    first, leave = _borders(segment_ids, B, T, C)
    result: Any = _delta(
        plan, whole(q.astype(low)), whole(k.astype(low)), whole(v.astype(low)), g, whole(real(beta)), state, first, leave
    )
    results = [result[0][:, :T].astype(v.dtype)]
    if return_final_state:
        results.append(result[1])
    if return_chunk_states:
        results.append(jnp.moveaxis(result[2], 2, 1)[:, :: chunk_size // C])
    return results[0] if len(results) == 1 else tuple(results)


def _decay(log_decay: Array | None) -> str:
    return "none" if log_decay is None else "vector" if log_decay.ndim == 4 else "scalar"


def _borders(segment_ids: Array | None, B: int, T: int, C: int) -> tuple[Array, Array]:
    """(B, T) place in its chunk of the first token of each token's document, -1 if before the chunk, C at padding, so that
    padding meets nothing; (B, J) the same of the document each chunk is left with, to which padding after it belongs.
    """
    J = -(-T // C)
    padded = J * C
    if segment_ids is None:
        return jnp.full((B, padded), -1, jnp.int32), jnp.full((B, J), -1, jnp.int32)
    tail = [(0, 0), (0, padded - T)]
    start_BJC = jnp.pad(segments.starts(segment_ids), tail).reshape(B, J, C)
    place_C = jnp.arange(C, dtype=jnp.int32)
    first_BJC = jax.lax.cummax(jnp.where(start_BJC, place_C, -1), axis=2)
    leave_BJ = first_BJC[:, :, -1]
    first_BT = jnp.where(jnp.pad(segment_ids, tail) != 0, first_BJC.reshape(B, padded), C)
    return first_BT, leave_BJ


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _delta(
    plan: Plan,
    q: Array,
    k: Array,
    v: Array,
    g: Array | None,
    beta_BTH: Array,
    state: Array,
    first: Array,
    leave: Array,
) -> tuple[Array, ...]:
    """(o, last state, and the states that enter the chunks (B, H, J, K, V) if the plan says so)."""
    return _delta_fwd(plan, q, k, v, g, beta_BTH, state, first, leave)[0]


def _arrays(
    plan: Plan, q: Array, k: Array, v: Array, g: Array | None, beta_BTH: Array, state: Array, first: Array, leave: Array
) -> dict[str, Array]:
    """What the kernels read, by name; gates of tokens as (B, H, T)."""
    x = {"q": q, "k": k, "v": v, "beta": jnp.swapaxes(beta_BTH, 1, 2), "state": state, "first": first, "leave": leave}
    if g is not None:
        coarse, fine = sums(g, plan.C)
        if plan.decay == "scalar":
            coarse, fine = jnp.swapaxes(coarse, 1, 2), jnp.swapaxes(fine, 1, 2)
        x |= {"coarse": coarse, "fine": fine}
    return x


def _delta_fwd(plan: Plan, *arguments: Any) -> tuple[tuple[Array, ...], Any]:
    x = _arrays(plan, *arguments)
    kept = solve(plan, x)
    y = forward(plan, x | kept)
    result = (y["o"], y["last"], y["states"]) if plan.states else (y["o"], y["last"])
    return result, (arguments, kept)


def _delta_bwd(plan: Plan, residuals: Any, grads: tuple[Array, ...]) -> tuple[Array | None, ...]:
    arguments, kept = residuals
    x = _arrays(plan, *arguments) | kept | {"d_o": grads[0], "d_last": grads[1]}
    if plan.states:
        x["d_entering"] = grads[2]
    y = backward(plan, x)
    d_g = y.get("d_g")
    if plan.decay == "scalar":
        d_g = jnp.swapaxes(y["d_g"], 1, 2)
    d_beta = jnp.swapaxes(y["d_beta"], 1, 2)
    d_q, d_k = (y[name].astype(plan.low) for name in ("d_q", "d_k"))
    return d_q, d_k, y["d_v"], d_g, d_beta, y["d_state"], None, None


_delta.defvjp(_delta_fwd, _delta_bwd)
