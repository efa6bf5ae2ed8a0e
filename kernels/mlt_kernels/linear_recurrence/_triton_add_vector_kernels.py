"""Triton kernels of the add rule with one decay a head and key dim (GLA).

With q_into the queries decayed from the chunk's start, k_out the keys decayed to its end, kept what is left of the state S that
entered, all of them 0 across a document border, and u write strengths,

    O  = scale (scores (u V) + q_into S)
    S' = kept S + k_out^T u V

The pairs inside a chunk are taken level by level, see `_triton_levels`. `prepare` and `inner` take one chunk, the others walk
over the chunks of a head.

q, k (B, T, Hk, K); v, o (B, T, H, V); q_into, k_out (B, T, H, K); kept (B, J, H, K) float32; scores (B, H, J, C, C) without write
strengths; u (B, H, T) float32; coarse, fine, first, first_end: see `_triton_levels`. T is J chunks of C tokens (i as query, j as
key).
"""

import triton
import triton.language as tl

from mlt_kernels.linear_recurrence._triton_levels import ahead, borders, halves, meets, sum_rows, visible
from mlt_kernels.linear_recurrence._triton_tiles import (
    dot,
    load_keys,
    load_square,
    load_state,
    load_tokens,
    scaled,
    store_felt,
    store_keys,
    store_square,
    store_state,
    store_tokens,
    strictly_lower,
)
from mlt_kernels.linear_recurrence._triton_walk import (
    ends_group,
    entering,
    group,
    keep_first,
    keep_last,
    load_writes,
    with_cotangent,
)


@triton.jit
def prepare(
    q, k, coarse, fine, first, first_end,
    T, J,
    scores, q_into, k_out, kept,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    KEYS: tl.constexpr, LEVELS: tl.constexpr, HAS_DOCS: tl.constexpr,
):  # fmt: skip
    """What the walks read, in the dtype of q but for kept (float32). Programs are (chunk, value head, row)."""
    c, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    hk = h // (H // HK)
    place = tl.arange(0, C)
    own = place[:, None] == place[None, :]
    scores_CC = tl.zeros((C, C), tl.float32)
    for at in range(0, K, KEYS):
        kk = at + tl.arange(0, KEYS)
        q_CK = load_tokens(q, b, c, hk, kk, T, HK, K, C).to(tl.float32)
        k_CK = load_tokens(k, b, c, hk, kk, T, HK, K, C).to(tl.float32)
        coarse_CK, fine_CK = load_tokens(coarse, b, c, h, kk, T, H, K, C), load_tokens(fine, b, c, h, kk, T, H, K, C)
        scores_CC += tl.where(own, tl.sum(q_CK * k_CK, axis=1)[:, None], 0.0)
        for level in range(0, LEVELS):
            half = 1 << level
            _, x_CK, decay = halves(q_CK, k_CK, coarse_CK, fine_CK, coarse, fine, half, b, c, h, kk, T, H, K, C)
            x_CK = (x_CK * decay).to(q.dtype.element_ty)
            scores_CC += tl.where(meets(half, C), dot(x_CK, tl.trans(x_CK)), 0.0)
        into, out, kept_K = borders(coarse_CK, fine_CK, coarse, fine, first, first_end, b, c, h, kk, T, J, H, K, C, HAS_DOCS)
        store_tokens(q_into, q_CK * into, b, c, h, kk, T, H, K, C)
        store_tokens(k_out, k_CK * out, b, c, h, kk, T, H, K, C)
        store_keys(kept, kept_K, b, c, h, kk, J, H, K)
    scores_CC = tl.where(visible(first, b, c, T, C, HAS_DOCS), scores_CC, 0.0)
    store_square(scores, scores_CC, (b * H + h) * J + c, C)


@triton.jit
def load_written(v, u, b, c, h, vv, T, H: tl.constexpr, V: tl.constexpr, C: tl.constexpr, HAS_U: tl.constexpr):
    """(C, len(vv)): values times their write strengths."""
    v_CV = load_tokens(v, b, c, h, vv, T, H, V, C)
    return scaled(v_CV, load_writes(u, b * H + h, c, T, C, HAS_U)) if HAS_U else v_CV


@triton.jit
def forward(
    scores, q_into, k_out, kept, v, u, initial,
    T, J,
    o, final, states,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, SCALE: tl.constexpr,
    HAS_U: tl.constexpr, HAS_INITIAL: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """o, the final state (B, H, K, V), and with STRIDE > 0 the states (B, N, H, K, V) entering every STRIDE-th chunk. Programs
    own a slab of V."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = b * H + h
    kk = tl.arange(0, KEYS)
    vv = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    state = entering(initial, head, kk, vv, K, V, HAS_INITIAL)
    for c in range(0, J):
        keep_first(states, state, b, c, h, kk, vv, J, H, K, V, STRIDE)
        q_CK = load_tokens(q_into, b, c, h, kk, T, H, K, C)
        write_CV = load_written(v, u, b, c, h, vv, T, H, V, C, HAS_U)
        o_CV = dot(load_square(scores, head * J + c, C), write_CV) + dot(q_CK, state.to(q_CK.dtype))
        store_tokens(o, SCALE * o_CV, b, c, h, vv, T, H, V, C)
        k_CK = load_tokens(k_out, b, c, h, kk, T, H, K, C)
        state = load_keys(kept, b, c, h, kk, J, H, K)[:, None] * state + dot(tl.trans(k_CK), write_CV)
    store_state(final, state, head, kk, vv, K, V)


@triton.jit
def queries(
    q_into, k_out, kept, v, u, do, initial,
    T, J,
    dq_into, reads, anchors,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, SCALE: tl.constexpr,
    HAS_U: tl.constexpr, HAS_INITIAL: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """The gradient of q_into (B, T, H, K); what decays feel of all reads of a chunk (B, J, H, K); the state that enters the last
    of every STRIDE chunks (B, N, H, K, V). Programs own a slab of K."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    kk = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    vv = tl.arange(0, VALUES)
    state = entering(initial, b * H + h, kk, vv, K, V, HAS_INITIAL)
    for c in range(0, J):
        keep_last(anchors, state, b, c, h, kk, vv, J, H, K, V, STRIDE)
        do_CV = load_tokens(do, b, c, h, vv, T, H, V, C)
        dq_CK = SCALE * dot(do_CV, tl.trans(state.to(do_CV.dtype)))
        store_tokens(dq_into, dq_CK, b, c, h, kk, T, H, K, C)
        q_CK = load_tokens(q_into, b, c, h, kk, T, H, K, C)
        store_keys(reads, tl.sum(q_CK.to(tl.float32) * dq_CK, axis=0), b, c, h, kk, J, H, K)
        k_CK = load_tokens(k_out, b, c, h, kk, T, H, K, C)
        write_CV = load_written(v, u, b, c, h, vv, T, H, V, C, HAS_U)
        state = load_keys(kept, b, c, h, kk, J, H, K)[:, None] * state + dot(tl.trans(k_CK), write_CV)


@triton.jit
def keys(
    q_into, k_out, kept, v, u, do, anchors, d_final, d_states,
    T, J,
    dk_out, writes, met,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, SCALE: tl.constexpr,
    HAS_U: tl.constexpr, HAS_STATES: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """The gradient of k_out (B, T, H, K); what decays feel of all writes of a chunk (B, J, H, K); and (B, N, H, K) the states of
    `queries` times the cotangents of the states that leave those chunks. Programs own a slab of K and walk backwards."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    kk = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    vv = tl.arange(0, VALUES)
    d_state = load_state(d_final, b * H + h, kk, vv, K, V)
    for step in range(0, J):
        c = J - 1 - step
        if ends_group(c, J, STRIDE):
            n = group(b, c, h, J, H, STRIDE)
            met_K = tl.sum(load_state(anchors, n, kk, vv, K, V) * d_state, axis=1)
            tl.store(met + n * K + kk, met_K, mask=kk < K)
        write_CV = load_written(v, u, b, c, h, vv, T, H, V, C, HAS_U)
        dk_CK = dot(write_CV, tl.trans(d_state.to(write_CV.dtype)))
        store_tokens(dk_out, dk_CK, b, c, h, kk, T, H, K, C)
        k_CK = load_tokens(k_out, b, c, h, kk, T, H, K, C)
        store_keys(writes, tl.sum(k_CK.to(tl.float32) * dk_CK, axis=0), b, c, h, kk, J, H, K)
        q_CK = load_tokens(q_into, b, c, h, kk, T, H, K, C)
        do_CV = load_tokens(do, b, c, h, vv, T, H, V, C)
        d_state = load_keys(kept, b, c, h, kk, J, H, K)[:, None] * d_state + SCALE * dot(tl.trans(q_CK), do_CV)
        d_state = with_cotangent(d_state, d_states, b, c, h, kk, vv, J, H, K, V, HAS_STATES, STRIDE)


@triton.jit
def values(
    scores, q_into, k_out, kept, v, u, do, d_final, d_states,
    T, J,
    dv, du, d_initial,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, SCALE: tl.constexpr,
    HAS_U: tl.constexpr, HAS_STATES: tl.constexpr, STRIDE: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """dv (B, T, H, V); if GATED what write strengths feel (X, B, H, T); the cotangent of the initial state (B, H, K, V). Programs
    own a slab of V and walk backwards."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = b * H + h
    kk = tl.arange(0, KEYS)
    vv = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    d_state = load_state(d_final, head, kk, vv, K, V)
    for step in range(0, J):
        c = J - 1 - step
        do_CV = load_tokens(do, b, c, h, vv, T, H, V, C)
        k_CK = load_tokens(k_out, b, c, h, kk, T, H, K, C)
        scores_CC = load_square(scores, head * J + c, C)
        d_write = SCALE * dot(tl.trans(scores_CC), do_CV) + dot(k_CK, d_state.to(k_CK.dtype))
        store_tokens(dv, load_writes(u, head, c, T, C, HAS_U)[:, None] * d_write, b, c, h, vv, T, H, V, C)
        if GATED:
            v_CV = load_tokens(v, b, c, h, vv, T, H, V, C).to(tl.float32)
            store_felt(du, tl.sum(v_CV * d_write, axis=1), tl.program_id(0), head, c, T, H, C)
        q_CK = load_tokens(q_into, b, c, h, kk, T, H, K, C)
        d_state = load_keys(kept, b, c, h, kk, J, H, K)[:, None] * d_state + SCALE * dot(tl.trans(q_CK), do_CV)
        d_state = with_cotangent(d_state, d_states, b, c, h, kk, vv, J, H, K, V, HAS_STATES, STRIDE)
    store_state(d_initial, d_state, head, kk, vv, K, V)


@triton.jit
def inner(
    q, k, v, coarse, fine, u, first, first_end, do, dq_into, dk_out, through,
    T, J,
    dq, dk, dg,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, SCALE: tl.constexpr, LEVELS: tl.constexpr,
    HAS_U: tl.constexpr, HAS_DOCS: tl.constexpr,
):  # fmt: skip
    """dq, dk and dg (B, T, H, K), from the pairs inside the chunk, the gradients of q_into and k_out, and through (B, J, H, K):
    what decays feel of the state that passes the whole chunk. Programs own a slab of K of one chunk and all of V (one tile).

    No sum of dg is a difference: a token feels the pairs that it lies between, level by level."""
    slabs: tl.constexpr = (K + KEYS - 1) // KEYS
    low: tl.constexpr = q.dtype.element_ty
    exact: tl.constexpr = low == tl.float32
    c, h, b = tl.program_id(0) // slabs, tl.program_id(1), tl.program_id(2).to(tl.int64)
    hk = h // (H // HK)
    kk = tl.program_id(0) % slabs * KEYS + tl.arange(0, KEYS)
    vv = tl.arange(0, VALUES)
    t = tl.arange(0, C)[:, None]
    other = tl.arange(0, C)[None, :]

    d_scores = dot(load_tokens(do, b, c, h, vv, T, H, V, C), tl.trans(load_tokens(v, b, c, h, vv, T, H, V, C)))
    d_scores = SCALE * d_scores * load_writes(u, b * H + h, c, T, C, HAS_U)[None, :]
    d_scores = tl.where(visible(first, b, c, T, C, HAS_DOCS), d_scores, 0.0)
    own = tl.sum(tl.where(t == other, d_scores, 0.0), axis=1)[:, None]
    both = strictly_lower(d_scores, C)
    both = both + tl.trans(both)  # a key's row has what its queries' have in its column

    q_CK = load_tokens(q, b, c, hk, kk, T, HK, K, C)
    k_CK = load_tokens(k, b, c, hk, kk, T, HK, K, C)
    coarse_CK, fine_CK = load_tokens(coarse, b, c, h, kk, T, H, K, C), load_tokens(fine, b, c, h, kk, T, H, K, C)
    into, out, _ = borders(coarse_CK, fine_CK, coarse, fine, first, first_end, b, c, h, kk, T, J, H, K, C, HAS_DOCS)
    into *= load_tokens(dq_into, b, c, h, kk, T, H, K, C).to(tl.float32)
    out *= load_tokens(dk_out, b, c, h, kk, T, H, K, C).to(tl.float32)
    dg_CK = sum_rows(t <= other, q_CK * into, exact) + sum_rows(t > other, k_CK * out, exact)
    dg_CK += load_keys(through, b, c, h, kk, J, H, K)[None, :]
    dq_CK = own * k_CK + into
    dk_CK = own * q_CK + out
    for level in range(0, LEVELS):
        half = 1 << level
        right, x_CK, decay = halves(q_CK, k_CK, coarse_CK, fine_CK, coarse, fine, half, b, c, h, kk, T, H, K, C)
        x_CK = x_CK.to(tl.float32)
        weights = tl.where(meets(half, C), both, 0.0).to(low)
        dx_CK = decay * dot(weights, (x_CK * decay).to(low))
        dq_CK += tl.where(right, dx_CK, 0.0)
        dk_CK += tl.where(right, 0.0, dx_CK)
        dg_CK += sum_rows(ahead(half, C), x_CK * dx_CK, exact)
    store_tokens(dq, dq_CK, b, c, h, kk, T, H, K, C)
    store_tokens(dk, dk_CK, b, c, h, kk, T, H, K, C)
    store_tokens(dg, dg_CK, b, c, h, kk, T, H, K, C)
