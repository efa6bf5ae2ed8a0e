"""Delta rule on a GPU, the backward kernels: *reverse*, one loop from the last chunk to the first, and *local*, a chunk each.

With dO the cotangent of the output and dS' of the state that leaves a chunk, W the writes and T, D, G as in the run kernel:

    dW  = scale (Q K^T . D)^T dO + exp(G_end - G) K dS'
    X   = (T . D)^T dW                                       the gradient of beta (V - reads)
    dS  = exp(G_end) dS' + scale (exp(G) Q)^T dO - (exp(G) K)^T beta X

The inverse itself is never differentiated: its matrix I + S . D has the gradient -X W^T. *reverse* carries dS and keeps X
and every dS'; *local* makes all gradients from those, W and the states. A decay acts on every pair it lies between, so its
gradient sums over those pairs; by way of G it would be a small difference of large sums.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from mlt_kernels.linear_recurrence import _pallas_delta_vector as vector
from mlt_kernels.linear_recurrence._pallas_delta_chunk import (
    Factors,
    Plan,
    Refs,
    across,
    count_dot,
    dot,
    factors,
    grid,
    kept,
    outer,
    strictly,
)
from mlt_kernels.linear_recurrence._pallas_delta_parts import fine_dot
from mlt_kernels.linear_recurrence._pallas_delta_run import SHARED, overlap, pick, solved, states, sweep_factors


def backward(plan: Plan, x: dict[str, Array]) -> dict[str, Array]:
    """Gradients d_q, d_k, d_v, d_beta, d_g, d_state from the arrays of the forward pass, d_o, d_last and d_entering."""
    x = x | states(plan, x)
    outputs: dict[str, tuple[Any, str]] = {
        "d_states": (plan.low, "states"),
        "pull": (jnp.float32, "value"),
        "d_state": (jnp.float32, "state"),
    }
    names = [*SHARED, "q", "scores", "d_o", "d_last", "d_entering"]
    carried = plan.sweep(functools.partial(_reverse_kernel, plan=plan), pick(x, names), outputs)
    x = x | carried
    names = ["q", "k", "v", "beta", "first", "leave", "coarse", "fine", "write", "pull", "d_o", "states", "d_states"]
    key, gate = ("vector", "vector") if plan.decay == "vector" else ("key", "gate")
    dtype = jnp.float32 if plan.decay == "vector" else x["q"].dtype
    outputs = {"d_q": (dtype, key), "d_k": (dtype, key), "d_v": (x["v"].dtype, "value")}
    outputs |= {"d_beta": (jnp.float32, "gate")} | ({} if plan.decay == "none" else {"d_g": (jnp.float32, gate)})
    if plan.decay == "vector":
        outputs |= {"d_scores": (jnp.float32, "square"), "d_overlap": (jnp.float32, "square")}
    grads = plan.tile(functools.partial(_local_kernel, plan=plan), pick(x, names), outputs, heads=plan.Hk, warps=plan.tile_warps)
    if plan.decay == "vector":
        grads |= vector.within_chunks(plan, x | grads)
    return grads | {"d_state": carried["d_state"]}


def _reverse_kernel(x: Refs, y: Refs, *, plan: Plan) -> None:
    C, low = plan.C, plan.low

    def chunk(m: Array, d_state_KV: Array) -> Array:
        n = plan.J - 1 - m
        rows = pl.ds(n * C, C)
        f = sweep_factors(plan, x, n, rows)
        q_CK, k_CK, d_o_CV = x["q"][rows, :], x["k"][rows, :], x["d_o"][rows, :]
        beta_C = x["beta"][rows]
        y["d_states"][n] = d_state_KV.astype(low)
        scores_CC = x["scores"][n] if f.pair is None else dot(q_CK, k_CK, low, (1, 1)) * f.pair
        d_write_CV = plan.scale * fine_dot(scores_CC, d_o_CV, low, (0, 0)) + across(plan, f.leave, k_CK, d_state_KV)
        pull_CV = solved(plan, x, n, overlap(plan, x, f, n, k_CK, beta_C), d_write_CV, transposed=True)
        y["pull"][rows, :] = pull_CV
        entering_KV = kept(f.survive, d_state_KV) + plan.scale * outer(plan, f.into, q_CK, d_o_CV, dot)
        entering_KV -= outer(plan, f.into, k_CK, pull_CV * beta_C[:, None])
        return entering_KV + x["d_entering"][n] if "d_entering" in x else entering_KV

    y["d_state"][...] = jax.lax.fori_loop(0, plan.J, chunk, x["d_last"][...])


class _Sums(NamedTuple):
    """What `_local_kernel` sums over slices of V."""

    d_q: Array  # (C, K), over the value heads of the program too
    d_k: Array
    d_beta: Array  # (C,)
    into: Array  # gradients of the logarithms of the factors: (C,) or (C, K)
    leave: Array
    survive: Array  # () or (K,)
    d_scores: Array  # (C, C): dO W^T
    d_overlap: Array  # X W^T


def _local_kernel(x: Refs, y: Refs, *, plan: Plan) -> None:
    C, K = plan.C, plan.K
    q_CK, k_CK = x["q"][...], x["k"][...]
    n = pl.program_id(1)

    def head(r: Array, d_qk: tuple[Array, Array]) -> tuple[Array, Array]:
        def load(name: str, at: Any) -> Array:
            return x[name][at, r, :] if plan.decay == "vector" else x[name][r, at]

        f = factors(plan, x["first"][...], x["leave"][n], load, slice(None), C - 1)
        beta_C = x["beta"][r, :]
        like = jnp.zeros(f.into.shape, jnp.float32)
        square = jnp.zeros((C, C), jnp.float32)
        start = _Sums(*d_qk, jnp.zeros((C,), jnp.float32), like, like, jnp.zeros(f.survive.shape, jnp.float32), square, square)
        width = min(plan.V, 32)
        slices = functools.partial(_slice, plan, x, y, f, r, q_CK, k_CK, beta_C, width)
        total = jax.lax.fori_loop(0, plan.V // width, slices, start)
        if plan.decay == "vector":
            y["d_scores"][r] = plan.scale * total.d_scores
            y["d_overlap"][r] = -total.d_overlap
            y["d_g"][:, r, :] = vector.from_state(plan, total.into, total.leave, total.survive)
            d_q_CK, d_k_CK, d_beta_C = total.d_q, total.d_k, total.d_beta
        else:
            d_q_CK, d_k_CK, d_beta_C = _inside(plan, x, y, f, r, q_CK, k_CK, beta_C, total)
        y["d_beta"][r, :] = d_beta_C
        return d_q_CK, d_k_CK

    zero = jnp.zeros((C, K), jnp.float32)
    d_q_CK, d_k_CK = jax.lax.fori_loop(0, plan.H // plan.Hk, head, (zero, zero))
    at = (slice(None), 0, slice(None)) if plan.decay == "vector" else ...
    y["d_q"][at] = d_q_CK.astype(y["d_q"].dtype)
    y["d_k"][at] = d_k_CK.astype(y["d_k"].dtype)


def _slice(
    plan: Plan,
    x: Refs,
    y: Refs,
    f: Factors,
    r: Array,
    q_CK: Array,
    k_CK: Array,
    beta_C: Array,
    width: int,
    m: Array,
    total: _Sums,
) -> _Sums:
    """Adds what slice m of V gives; writes its d_v."""
    low, columns = plan.low, pl.ds(m * width, width)
    d_o_CV, v_CV, write_CV, pull_CV = (x[name][:, r, columns] for name in ("d_o", "v", "write", "pull"))
    state_KV, d_state_KV = x["states"][r, :, columns], x["d_states"][r, :, columns]
    y["d_v"][:, r, columns] = (pull_CV * beta_C[:, None]).astype(y["d_v"].dtype)

    def by_key(x_CV: Array, state_KV: Array, factor: Array) -> Array:
        return fine_dot(x_CV, state_KV, low, (1, 1)) * (factor if factor.ndim == 2 else factor[:, None])

    def of_factor(x_CK: Array, factor: Array) -> Array:
        return x_CK if factor.ndim == 2 else jnp.sum(x_CK, axis=1)

    read_q_CK = plan.scale * by_key(d_o_CV, state_KV, f.into)
    read_k_CK = by_key(pull_CV, state_KV, f.into)
    left_CK = by_key(write_CV, d_state_KV, f.leave)
    read_by_beta_CK = read_k_CK * beta_C[:, None]
    survived_KV = state_KV.astype(jnp.float32) * d_state_KV.astype(jnp.float32)
    survived = jnp.sum(survived_KV, axis=1)
    d_beta_C = jnp.sum(pull_CV * v_CV.astype(jnp.float32), axis=1) - jnp.sum(k_CK * read_k_CK, axis=1)
    return _Sums(
        d_q=total.d_q + read_q_CK,
        d_k=total.d_k + left_CK - read_by_beta_CK,
        d_beta=total.d_beta + d_beta_C,
        into=total.into + of_factor(q_CK * read_q_CK - k_CK * read_by_beta_CK, f.into),
        leave=total.leave + of_factor(k_CK * left_CK, f.leave),
        survive=total.survive + f.survive * (survived if f.survive.ndim else jnp.sum(survived)),
        d_scores=total.d_scores + fine_dot(d_o_CV, write_CV, low, (1, 1)),
        d_overlap=total.d_overlap + fine_dot(pull_CV, write_CV, low, (1, 1)),
    )


def _inside(
    plan: Plan, x: Refs, y: Refs, f: Factors, r: Array, q_CK: Array, k_CK: Array, beta_C: Array, total: _Sums
) -> tuple[Array, Array, Array]:
    """Adds to d_q, d_k and d_beta what comes by the pairs of the chunk, under a scalar decay or none; writes d_g."""
    C, low, pair_CC = plan.C, plan.low, f.pair
    assert pair_CC is not None
    strict_CC = strictly(pair_CC)
    scores_CC, overlap_CC = dot(q_CK, k_CK, low, (1, 1)), dot(k_CK, k_CK, low, (1, 1))
    d_scores_CC = plan.scale * total.d_scores * pair_CC
    d_overlap_CC = -total.d_overlap * strict_CC
    d_beta_C = total.d_beta + jnp.sum(d_overlap_CC * overlap_CC, axis=1)
    d_overlap_CC *= beta_C[:, None]
    d_q_CK = total.d_q + fine_dot(d_scores_CC, k_CK, low)
    d_k_CK = total.d_k + fine_dot(d_scores_CC, q_CK, low, (0, 0))
    d_k_CK += fine_dot(d_overlap_CC + d_overlap_CC.T, k_CK, low)
    if plan.decay != "none":
        # (token that decays, query) after the sum over the keys before the token; then over queries from it on.
        key_before_CC = grid(C, 1) < grid(C, 0)
        weights_CC = d_scores_CC * scores_CC + d_overlap_CC * overlap_CC
        by_query_CC = count_dot(plan, key_before_CC, weights_CC, (1, 1)) + total.into[None, :]
        d_g_C = jnp.sum(jnp.where(key_before_CC, total.leave[None, :], by_query_CC), axis=1) + total.survive
        y["d_g"][r, :] = d_g_C
    return d_q_CK, d_k_CK, d_beta_C
