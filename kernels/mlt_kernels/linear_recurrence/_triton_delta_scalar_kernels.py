"""Delta rule in Triton, the kernels of no decay or one decay a head (DeltaNet, gated delta).

In a chunk entered with state S, with D decays between tokens, G their sums since the chunk or the document began, all of them 0
where tokens do not meet, and T . D the inverse that `delta_solve` left,

    W  = (T . D) beta (V - exp(G) K S)                    what is written
    O  = scale (exp(G) Q S + (Q K^T . D) W)
    S' = exp(G_end) S + (exp(G_end - G) K)^T W

and with dO and dS' the cotangents of O and S',

    dW  = scale (Q K^T . D)^T dO + exp(G_end - G) K dS'
    X   = (T . D)^T dW                                    the gradient of beta (V - reads)
    dS  = exp(G_end) dS' + scale (exp(G) Q)^T dO - (exp(G) K)^T beta X

The inverse itself is never differentiated: its matrix I + S . D has the gradient -X W^T. `delta_run` and `delta_reverse` walk
over the chunks and own a slab of V and all of K; `delta_pairs` and `delta_keys` take one chunk each. Arrays and letters are
those of `_triton_add_scalar_kernels`; states by chunk are (B, J, H, K, V), squares (B, H, J, C, C), inverses (P, B, H, J, C, C).
"""

import triton
import triton.language as tl

from mlt_kernels.linear_recurrence._triton_decays import factors, felt_by_pairs
from mlt_kernels.linear_recurrence._triton_delta_tools import by_pairs, by_states, fine_dot, nearest, solved
from mlt_kernels.linear_recurrence._triton_tiles import (
    dot,
    load_square,
    load_state,
    load_tokens,
    store_felt,
    store_square,
    store_state,
    store_tokens,
    strictly_lower,
)
from mlt_kernels.linear_recurrence._triton_walk import entering, keep_first, load_writes, with_cotangent


@triton.jit
def delta_run(
    q, k, v, coarse, fine, u, first, first_end, inverse, initial,
    T, J,
    o, final, states, write,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, SCALE: tl.constexpr,
    HAS_G: tl.constexpr, HAS_U: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_INITIAL: tl.constexpr, STRIDE: tl.constexpr,
    OUTPUT: tl.constexpr,
):  # fmt: skip
    """With OUTPUT o and the final state, else all that is written, W (B, T, H, V); with STRIDE > 0 the states that enter every
    STRIDE-th chunk."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head, hk = b * H + h, h // (H // HK)
    low: tl.constexpr = k.dtype.element_ty
    kk = tl.arange(0, KEYS)
    vv = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    state = entering(initial, head, kk, vv, K, V, HAS_INITIAL)
    for c in range(0, J):
        keep_first(states, state, b, c, h, kk, vv, J, H, K, V, STRIDE)
        k_CK = load_tokens(k, b, c, hk, kk, T, HK, K, C)
        v_CV = load_tokens(v, b, c, h, vv, T, H, V, C)
        u_C = load_writes(u, head, c, T, C, HAS_U)
        pair, into, out, kept = factors(coarse, fine, first, first_end, b, head, c, T, J, C, HAS_G, HAS_DOCS, False)
        low_state = nearest(state, low)
        strict_CC = strictly_lower(dot(k_CK, tl.trans(k_CK)) * pair * u_C[:, None], C)
        right_CV = u_C[:, None] * (v_CV.to(tl.float32) - into[:, None] * dot(k_CK, low_state))
        write_CV = solved(inverse, head * J + c, tl.num_programs(2) * H * J, strict_CC, right_CV, low, C)
        if OUTPUT:
            q_CK = load_tokens(q, b, c, hk, kk, T, HK, K, C)
            scores = dot(q_CK, tl.trans(k_CK)) * pair
            o_CV = into[:, None] * dot(q_CK, low_state) + fine_dot(scores, write_CV, low)
            store_tokens(o, SCALE * o_CV, b, c, h, vv, T, H, V, C)
        else:
            store_tokens(write, write_CV, b, c, h, vv, T, H, V, C)
        state = kept * state + fine_dot(tl.trans(k_CK), write_CV * out[:, None], low)
    if OUTPUT:
        store_state(final, state, head, kk, vv, K, V)


@triton.jit
def delta_reverse(
    q, k, coarse, fine, u, first, first_end, inverse, do, d_final, d_entering,
    T, J,
    pull, d_states, d_initial,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, SCALE: tl.constexpr,
    HAS_G: tl.constexpr, HAS_U: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_STATES: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """X (B, T, H, V), the cotangents of the states that leave the chunks, and that of the initial state. Walks backwards."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head, hk = b * H + h, h // (H // HK)
    low: tl.constexpr = k.dtype.element_ty
    kk = tl.arange(0, KEYS)
    vv = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    d_state = load_state(d_final, head, kk, vv, K, V)
    for step in range(0, J):
        c = J - 1 - step
        store_state(d_states, d_state, (b * J + c) * H + h, kk, vv, K, V)
        q_CK = load_tokens(q, b, c, hk, kk, T, HK, K, C)
        k_CK = load_tokens(k, b, c, hk, kk, T, HK, K, C)
        do_CV = load_tokens(do, b, c, h, vv, T, H, V, C)
        u_C = load_writes(u, head, c, T, C, HAS_U)
        pair, into, out, kept = factors(coarse, fine, first, first_end, b, head, c, T, J, C, HAS_G, HAS_DOCS, True)
        scores = SCALE * dot(k_CK, tl.trans(q_CK)) * pair
        d_write = fine_dot(scores, do_CV, low) + out[:, None] * dot(k_CK, nearest(d_state, low))
        strict_CC = strictly_lower(dot(k_CK, tl.trans(k_CK)) * pair * u_C[None, :], C, True)
        pull_CV = solved(inverse, head * J + c, tl.num_programs(2) * H * J, strict_CC, d_write, low, C, True)
        store_tokens(pull, pull_CV, b, c, h, vv, T, H, V, C)
        read = nearest(do_CV.to(tl.float32) * (SCALE * into)[:, None], low)
        taken = pull_CV * (u_C * into)[:, None]
        d_state = kept * d_state + dot(tl.trans(q_CK), read) - fine_dot(tl.trans(k_CK), taken, low)
        d_state = with_cotangent(d_state, d_entering, b, c, h, kk, vv, J, H, K, V, HAS_STATES, STRIDE)
    store_state(d_initial, d_state, head, kk, vv, K, V)


@triton.jit
def delta_pairs(
    q, k, v, coarse, fine, u, first, first_end, do, write, pull,
    T, J,
    dv, du, pairs, d_scores, d_overlap,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, SCALE: tl.constexpr,
    HAS_G: tl.constexpr, HAS_U: tl.constexpr, HAS_DOCS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """dv (B, T, H, V); the gradients of Q K^T and, by way of S, of K K^T (squares); what decays (pairs) and write strengths (du)
    feel of pairs of the chunk and of v (B, H, T). Programs are (chunk, head, row)."""
    c, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    head, hk = b * H + h, h // (H // HK)
    low: tl.constexpr = k.dtype.element_ty
    u_C = load_writes(u, head, c, T, C, HAS_U)
    du_C, by_query, by_key = by_pairs(do, write, pull, v, dv, u_C, b, c, h, T, H, V, C, VALUES, GATED, low)
    pair, _, _, _ = factors(coarse, fine, first, first_end, b, head, c, T, J, C, HAS_G, HAS_DOCS, False)
    by_query = SCALE * by_query * pair
    by_key = -strictly_lower(by_key * pair, C)
    if HAS_G or GATED:
        scores = tl.zeros((C, C), tl.float32)
        overlap = tl.zeros((C, C), tl.float32)
        for at in range(0, K, KEYS):
            kk = at + tl.arange(0, KEYS)
            k_CK = load_tokens(k, b, c, hk, kk, T, HK, K, C)
            overlap += dot(k_CK, tl.trans(k_CK))
            if HAS_G:
                scores += dot(load_tokens(q, b, c, hk, kk, T, HK, K, C), tl.trans(k_CK))
        overlap *= by_key
        at_T = head * T + c * C + tl.arange(0, C)
        if GATED:
            tl.store(du + at_T, du_C + tl.sum(overlap, axis=1))
        if HAS_G:
            weight = strictly_lower(by_query * scores, C) + overlap * u_C[:, None]
            tl.store(pairs + at_T, felt_by_pairs(weight, C))
    store_square(d_scores, by_query, head * J + c, C)
    store_square(d_overlap, by_key * u_C[:, None], head * J + c, C)


@triton.jit
def delta_keys(
    q, k, coarse, fine, u, first, first_end, do, write, pull, states, d_states, d_scores, d_overlap,
    T, J,
    dq, dk, du, reads, writes, through,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, SCALE: tl.constexpr,
    HAS_G: tl.constexpr, HAS_U: tl.constexpr, HAS_DOCS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """dq and dk (B, T, H, K); what write strengths feel of reads (du), and decays of reads, of writes (X, B, H, T) and of the
    state that passes the chunk (X, B, H, J). Programs are (chunk and slab of K, head, row)."""
    X: tl.constexpr = (K + KEYS - 1) // KEYS
    x, c = tl.program_id(0) % X, tl.program_id(0) // X
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head, hk = b * H + h, h // (H // HK)
    low: tl.constexpr = k.dtype.element_ty
    kk = x * KEYS + tl.arange(0, KEYS)
    read_q, read_k, left, passed = by_states(
        do, write, pull, states, d_states, b, c, h, kk, T, J, H, K, V, C, KEYS, VALUES, HAS_G, low
    )
    _, into, out, kept = factors(coarse, fine, first, first_end, b, head, c, T, J, C, HAS_G, HAS_DOCS, False)
    u_C = load_writes(u, head, c, T, C, HAS_U)
    read_q *= (SCALE * into)[:, None]
    read_k *= into[:, None]
    left *= out[:, None]
    q_CK = load_tokens(q, b, c, hk, kk, T, HK, K, C)
    k_CK = load_tokens(k, b, c, hk, kk, T, HK, K, C)
    if HAS_G or GATED:
        k_by_read = tl.sum(k_CK.to(tl.float32) * read_k, axis=1)
        if GATED:
            store_felt(du, -k_by_read, x, head, c, T, H, C)
        if HAS_G:
            store_felt(reads, tl.sum(q_CK.to(tl.float32) * read_q, axis=1) - u_C * k_by_read, x, head, c, T, H, C)
            store_felt(writes, tl.sum(k_CK.to(tl.float32) * left, axis=1), x, head, c, T, H, C)
            tl.store(through + (x * tl.num_programs(2) * H + head) * J + c, kept * tl.sum(passed, axis=0))
    by_query = load_square(d_scores, head * J + c, C)
    store_tokens(dq, read_q + fine_dot(by_query, k_CK, low), b, c, h, kk, T, H, K, C)
    by_key = load_square(d_overlap, head * J + c, C)
    place = tl.arange(0, C)
    both = tl.where(place[:, None] > place[None, :], by_key, tl.trans(by_key))
    d_k = left - u_C[:, None] * read_k + fine_dot(tl.trans(by_query), q_CK, low) + fine_dot(both, k_CK, low)
    store_tokens(dk, d_k, b, c, h, kk, T, H, K, C)
