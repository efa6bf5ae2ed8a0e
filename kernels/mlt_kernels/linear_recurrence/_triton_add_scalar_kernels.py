"""Triton kernels of the add rule with no decay or one decay a head. Programs are (slab, value head, row) and walk over chunks.

In a chunk entered with state S, with D decays between tokens, G their sums since the chunk or the document began, all of them 0
where tokens do not meet, and u write strengths,

    O  = scale ((Q K^T . D . u) V + exp(G) Q S)
    S' = exp(G_end) S + (exp(G_end - G) K)^T u V

`forward` and `values` own a slab of V and all of K, `queries` and `keys` a slab of K and all of V; slabs of a sum over the
other dim are added up outside. q, k (B, T, Hk, K); v, o (B, T, H, V); u (B, H, T) float32; decays: see `_triton_decays`. T is J
chunks of C tokens (i as query, j as key).
"""

import triton
import triton.language as tl

from mlt_kernels.linear_recurrence._triton_decays import factors, felt_by_pairs
from mlt_kernels.linear_recurrence._triton_tiles import (
    dot,
    load_state,
    load_tokens,
    scaled,
    store_felt,
    store_state,
    store_tokens,
    strictly_lower,
)
from mlt_kernels.linear_recurrence._triton_walk import entering, keep_first, keep_last, load_writes, with_cotangent


@triton.jit
def forward(
    q, k, v, coarse, fine, u, first, first_end, initial,
    T, J,
    o, final, states,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, SCALE: tl.constexpr,
    HAS_G: tl.constexpr, HAS_U: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_INITIAL: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """o, the final state (B, H, K, V), and with STRIDE > 0 the states (B, N, H, K, V) entering every STRIDE-th chunk."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head, hk = b * H + h, h // (H // HK)
    kk = tl.arange(0, KEYS)
    vv = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    state = entering(initial, head, kk, vv, K, V, HAS_INITIAL)
    for c in range(0, J):
        keep_first(states, state, b, c, h, kk, vv, J, H, K, V, STRIDE)
        q_CK = load_tokens(q, b, c, hk, kk, T, HK, K, C)
        k_CK = load_tokens(k, b, c, hk, kk, T, HK, K, C)
        v_CV = load_tokens(v, b, c, h, vv, T, H, V, C)
        u_C = load_writes(u, head, c, T, C, HAS_U)
        pair, into, out, kept = factors(coarse, fine, first, first_end, b, head, c, T, J, C, HAS_G, HAS_DOCS, False)
        scores = dot(q_CK, tl.trans(k_CK)) * pair * u_C[None, :]
        o_CV = dot(scores.to(v_CV.dtype), v_CV) + into[:, None] * dot(q_CK, state.to(q_CK.dtype))
        store_tokens(o, SCALE * o_CV, b, c, h, vv, T, H, V, C)
        written = scaled(v_CV, u_C * out)
        state = kept * state + dot(tl.trans(k_CK), written)
    store_state(final, state, head, kk, vv, K, V)


@triton.jit
def queries(
    q, k, v, coarse, fine, u, first, first_end, initial, do,
    T, J,
    dq, reads, pairs, anchors,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, SCALE: tl.constexpr,
    HAS_G: tl.constexpr, HAS_U: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_INITIAL: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """dq (B, T, H, K); with HAS_G also what decays feel (X, B, H, T): of reads of the entering state, and of pairs inside a
    chunk; and the state that enters the last of every STRIDE chunks (B, N, H, K, V). Walks forwards."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head, hk = b * H + h, h // (H // HK)
    kk = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    vv = tl.arange(0, VALUES)
    state = entering(initial, head, kk, vv, K, V, HAS_INITIAL)
    for c in range(0, J):
        if HAS_G:
            keep_last(anchors, state, b, c, h, kk, vv, J, H, K, V, STRIDE)
        k_CK = load_tokens(k, b, c, hk, kk, T, HK, K, C)
        v_CV = load_tokens(v, b, c, h, vv, T, H, V, C)
        do_CV = load_tokens(do, b, c, h, vv, T, H, V, C)
        u_C = load_writes(u, head, c, T, C, HAS_U)
        pair, into, out, kept = factors(coarse, fine, first, first_end, b, head, c, T, J, C, HAS_G, HAS_DOCS, False)
        d_scores = SCALE * dot(do_CV, tl.trans(v_CV)) * pair * u_C[None, :]
        inter = SCALE * into[:, None] * dot(do_CV, tl.trans(state.to(do_CV.dtype)))
        store_tokens(dq, dot(d_scores.to(k_CK.dtype), k_CK) + inter, b, c, h, kk, T, H, K, C)
        if HAS_G:
            q_CK = load_tokens(q, b, c, hk, kk, T, HK, K, C)
            weight = strictly_lower(d_scores * dot(q_CK, tl.trans(k_CK)), C)
            store_felt(reads, tl.sum(q_CK.to(tl.float32) * inter, axis=1), tl.program_id(0), head, c, T, H, C)
            store_felt(pairs, felt_by_pairs(weight, C), tl.program_id(0), head, c, T, H, C)
        written = scaled(v_CV, u_C * out)
        state = kept * state + dot(tl.trans(k_CK), written)


@triton.jit
def keys(
    q, k, v, coarse, fine, u, first, first_end, do, d_final, d_states,
    T, J,
    dk, writes, d_anchors,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, SCALE: tl.constexpr,
    HAS_G: tl.constexpr, HAS_U: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_STATES: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """dk (B, T, H, K); with HAS_G also what decays feel of writes (X, B, H, T), and the cotangent of the state that leaves the
    last of every STRIDE chunks (B, N, H, K, V). Walks backwards."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head, hk = b * H + h, h // (H // HK)
    kk = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    vv = tl.arange(0, VALUES)
    d_state = load_state(d_final, head, kk, vv, K, V)
    for step in range(0, J):
        c = J - 1 - step
        if HAS_G:
            keep_last(d_anchors, d_state, b, c, h, kk, vv, J, H, K, V, STRIDE)
        q_CK = load_tokens(q, b, c, hk, kk, T, HK, K, C)
        v_CV = load_tokens(v, b, c, h, vv, T, H, V, C)
        do_CV = load_tokens(do, b, c, h, vv, T, H, V, C)
        u_C = load_writes(u, head, c, T, C, HAS_U)
        pair, into, out, kept = factors(coarse, fine, first, first_end, b, head, c, T, J, C, HAS_G, HAS_DOCS, True)
        d_scores = SCALE * dot(v_CV, tl.trans(do_CV)) * pair * u_C[:, None]
        inter = (u_C * out)[:, None] * dot(v_CV, tl.trans(d_state.to(v_CV.dtype)))
        store_tokens(dk, dot(d_scores.to(q_CK.dtype), q_CK) + inter, b, c, h, kk, T, H, K, C)
        if HAS_G:
            k_CK = load_tokens(k, b, c, hk, kk, T, HK, K, C)
            store_felt(writes, tl.sum(k_CK.to(tl.float32) * inter, axis=1), tl.program_id(0), head, c, T, H, C)
        read = scaled(do_CV, SCALE * into)
        d_state = kept * d_state + dot(tl.trans(q_CK), read)
        d_state = with_cotangent(d_state, d_states, b, c, h, kk, vv, J, H, K, V, HAS_STATES, STRIDE)


@triton.jit
def values(
    q, k, v, coarse, fine, u, first, first_end, do, d_final, d_states,
    T, J,
    dv, du, d_initial,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, SCALE: tl.constexpr,
    HAS_G: tl.constexpr, HAS_U: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_STATES: tl.constexpr, STRIDE: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """dv (B, T, H, V); if GATED what write strengths feel (X, B, H, T); the cotangent of the initial state (B, H, K, V). Walks
    backwards."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head, hk = b * H + h, h // (H // HK)
    kk = tl.arange(0, KEYS)
    vv = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    d_state = load_state(d_final, head, kk, vv, K, V)
    for step in range(0, J):
        c = J - 1 - step
        q_CK = load_tokens(q, b, c, hk, kk, T, HK, K, C)
        k_CK = load_tokens(k, b, c, hk, kk, T, HK, K, C)
        do_CV = load_tokens(do, b, c, h, vv, T, H, V, C)
        pair, into, out, kept = factors(coarse, fine, first, first_end, b, head, c, T, J, C, HAS_G, HAS_DOCS, True)
        scores = SCALE * dot(k_CK, tl.trans(q_CK)) * pair
        d_write = dot(scores.to(do_CV.dtype), do_CV) + out[:, None] * dot(k_CK, d_state.to(k_CK.dtype))
        u_C = load_writes(u, head, c, T, C, HAS_U)
        store_tokens(dv, u_C[:, None] * d_write, b, c, h, vv, T, H, V, C)
        if GATED:
            v_CV = load_tokens(v, b, c, h, vv, T, H, V, C).to(tl.float32)
            store_felt(du, tl.sum(v_CV * d_write, axis=1), tl.program_id(0), head, c, T, H, C)
        read = scaled(do_CV, SCALE * into)
        d_state = kept * d_state + dot(tl.trans(q_CK), read)
        d_state = with_cotangent(d_state, d_states, b, c, h, kk, vv, J, H, K, V, HAS_STATES, STRIDE)
    store_state(d_initial, d_state, head, kk, vv, K, V)
