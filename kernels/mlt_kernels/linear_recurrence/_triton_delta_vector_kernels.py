"""Delta rule in Triton, the kernels of one decay a head and key dim (KDA).

The equations are those of `_triton_delta_scalar_kernels` with decays inside the products: `kda_prepare` makes Q K^T . D and
K K^T . D by the levels of `_triton_levels`, where every exponent is at most 0, and moves q and k to the chunk's borders:

    q_into = exp(G) Q    k_into = exp(G) K    k_out = exp(G_end - G) K    kept = exp(G_end)

all of them 0 across a document border. `delta_invert` makes T = (I + beta K K^T . D)^-1 of that, and the walks go

    W  = T beta (V - k_into S)      O  = scale (q_into S + (Q K^T . D) W)      S' = kept S + k_out^T W
    X  = T^T (scale (Q K^T . D)^T dO + k_out dS')      dS = kept dS' + scale q_into^T dO - k_into^T beta X

`kda_run` and `kda_reverse` own a slab of V and all of K, `kda_pairs` takes one chunk, `kda_keys` one chunk and slab of K. Arrays
and letters are those of `_triton_add_vector_kernels`; states by chunk are (B, J, H, K, V), squares (B, H, J, C, C), inverses
(P, B, H, J, C, C).
"""

import triton
import triton.language as tl

from mlt_kernels.linear_recurrence._triton_delta_tools import (
    by_pairs,
    by_states,
    fine_dot,
    load_square_rest,
    load_token_rest,
    nearest,
    solved,
    store_square_parts,
    store_token_parts,
    stored_dot,
)
from mlt_kernels.linear_recurrence._triton_levels import ahead, borders, halves, meets, sum_rows, visible
from mlt_kernels.linear_recurrence._triton_tiles import (
    dot,
    load_keys,
    load_square,
    load_state,
    load_tokens,
    store_felt,
    store_keys,
    store_square,
    store_state,
    store_tokens,
    strictly_lower,
)
from mlt_kernels.linear_recurrence._triton_walk import entering, keep_first, load_writes, with_cotangent


@triton.jit
def kda_prepare(
    q, k, coarse, fine, first, first_end,
    T, J,
    scores, overlap, q_into, k_into, k_out, kept,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, C: tl.constexpr, KEYS: tl.constexpr, LEVELS: tl.constexpr,
    HAS_DOCS: tl.constexpr,
):  # fmt: skip
    """What the walks read, in the dtype of q but for overlap and kept (float32); scores, k_into and k_out (P, B, ...) in parts
    that add up to them. overlap is 0 on the diagonal."""
    c, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    hk = h // (H // HK)
    low: tl.constexpr = q.dtype.element_ty
    place = tl.arange(0, C)
    own = place[:, None] == place[None, :]
    scores_CC = tl.zeros((C, C), tl.float32)
    overlap_CC = tl.zeros((C, C), tl.float32)
    for at in range(0, K, KEYS):
        kk = at + tl.arange(0, KEYS)
        q_CK = load_tokens(q, b, c, hk, kk, T, HK, K, C).to(tl.float32)
        k_CK = load_tokens(k, b, c, hk, kk, T, HK, K, C).to(tl.float32)
        coarse_CK, fine_CK = load_tokens(coarse, b, c, h, kk, T, H, K, C), load_tokens(fine, b, c, h, kk, T, H, K, C)
        scores_CC += tl.where(own, tl.sum(q_CK * k_CK, axis=1)[:, None], 0.0)
        for level in range(0, LEVELS):
            half = 1 << level
            _, x_CK, decay = halves(q_CK, k_CK, coarse_CK, fine_CK, coarse, fine, half, b, c, h, kk, T, H, K, C)
            x_CK, y_CK = x_CK * decay, k_CK * decay
            meet = meets(half, C)
            scores_CC += tl.where(meet, fine_dot(x_CK, tl.trans(y_CK), low), 0.0)
            overlap_CC += tl.where(meet, fine_dot(y_CK, tl.trans(y_CK), low), 0.0)
        into, out, kept_K = borders(coarse_CK, fine_CK, coarse, fine, first, first_end, b, c, h, kk, T, J, H, K, C, HAS_DOCS)
        store_tokens(q_into, nearest(q_CK * into, low), b, c, h, kk, T, H, K, C)
        store_token_parts(k_into, k_CK * into, b, c, h, kk, T, H, K, C)
        store_token_parts(k_out, k_CK * out, b, c, h, kk, T, H, K, C)
        store_keys(kept, kept_K, b, c, h, kk, J, H, K)
    lower = visible(first, b, c, T, C, HAS_DOCS)
    store_square_parts(scores, tl.where(lower, scores_CC, 0.0), (b * H + h) * J + c, tl.num_programs(2) * H * J, C)
    store_square(overlap, strictly_lower(tl.where(lower, overlap_CC, 0.0), C), (b * H + h) * J + c, C)


@triton.jit
def kda_run(
    scores, overlap, q_into, k_into, k_out, kept, inverse, v, u, initial,
    T, J,
    o, final, states, write,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, SCALE: tl.constexpr,
    HAS_U: tl.constexpr, HAS_INITIAL: tl.constexpr, STRIDE: tl.constexpr, OUTPUT: tl.constexpr,
):  # fmt: skip
    """With OUTPUT o and the final state, else all that is written, W (B, T, H, V); with STRIDE > 0 the states that enter every
    STRIDE-th chunk."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = b * H + h
    low: tl.constexpr = q_into.dtype.element_ty
    kk = tl.arange(0, KEYS)
    vv = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    state = entering(initial, head, kk, vv, K, V, HAS_INITIAL)
    for c in range(0, J):
        keep_first(states, state, b, c, h, kk, vv, J, H, K, V, STRIDE)
        n, apart = head * J + c, tl.num_programs(2) * H * J
        v_CV = load_tokens(v, b, c, h, vv, T, H, V, C)
        u_C = load_writes(u, head, c, T, C, HAS_U)
        low_state = nearest(state, low)
        strict_CC = load_square(overlap, n, C) * u_C[:, None]
        k_CK, rest_CK = load_tokens(k_into, b, c, h, kk, T, H, K, C), load_token_rest(k_into, b, c, h, kk, T, H, K, C)
        right_CV = u_C[:, None] * (v_CV.to(tl.float32) - stored_dot(k_CK, rest_CK, low_state, low))
        write_CV = solved(inverse, n, apart, strict_CC, right_CV, low, C)
        if OUTPUT:
            o_CV = dot(load_tokens(q_into, b, c, h, kk, T, H, K, C), low_state)
            o_CV += stored_dot(load_square(scores, n, C), load_square_rest(scores, n, apart, C), write_CV, low)
            store_tokens(o, SCALE * o_CV, b, c, h, vv, T, H, V, C)
        else:
            store_tokens(write, write_CV, b, c, h, vv, T, H, V, C)
        k_CK, rest_CK = load_tokens(k_out, b, c, h, kk, T, H, K, C), load_token_rest(k_out, b, c, h, kk, T, H, K, C)
        state = load_keys(kept, b, c, h, kk, J, H, K)[:, None] * state
        state += stored_dot(tl.trans(k_CK), tl.trans(rest_CK), write_CV, low)
    if OUTPUT:
        store_state(final, state, head, kk, vv, K, V)


@triton.jit
def kda_reverse(
    scores, overlap, q_into, k_into, k_out, kept, inverse, u, do, d_final, d_entering,
    T, J,
    pull, d_states, d_initial,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, SCALE: tl.constexpr,
    HAS_U: tl.constexpr, HAS_STATES: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """X (B, T, H, V), the cotangents of the states that leave the chunks, and that of the initial state. Walks backwards."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = b * H + h
    low: tl.constexpr = q_into.dtype.element_ty
    kk = tl.arange(0, KEYS)
    vv = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    d_state = load_state(d_final, head, kk, vv, K, V)
    for step in range(0, J):
        c = J - 1 - step
        n, apart = head * J + c, tl.num_programs(2) * H * J
        store_state(d_states, d_state, (b * J + c) * H + h, kk, vv, K, V)
        do_CV = load_tokens(do, b, c, h, vv, T, H, V, C)
        u_C = load_writes(u, head, c, T, C, HAS_U)
        scores_CC, rest_CC = load_square(scores, n, C), load_square_rest(scores, n, apart, C)
        d_write = SCALE * stored_dot(tl.trans(scores_CC), tl.trans(rest_CC), do_CV, low)
        k_CK, rest_CK = load_tokens(k_out, b, c, h, kk, T, H, K, C), load_token_rest(k_out, b, c, h, kk, T, H, K, C)
        d_write += stored_dot(k_CK, rest_CK, nearest(d_state, low), low)
        strict_CC = tl.trans(load_square(overlap, n, C)) * u_C[None, :]
        pull_CV = solved(inverse, n, apart, strict_CC, d_write, low, C, True)
        store_tokens(pull, pull_CV, b, c, h, vv, T, H, V, C)
        d_state = load_keys(kept, b, c, h, kk, J, H, K)[:, None] * d_state
        d_state += SCALE * dot(tl.trans(load_tokens(q_into, b, c, h, kk, T, H, K, C)), do_CV)
        k_CK, rest_CK = load_tokens(k_into, b, c, h, kk, T, H, K, C), load_token_rest(k_into, b, c, h, kk, T, H, K, C)
        d_state -= stored_dot(tl.trans(k_CK), tl.trans(rest_CK), pull_CV * u_C[:, None], low)
        d_state = with_cotangent(d_state, d_entering, b, c, h, kk, vv, J, H, K, V, HAS_STATES, STRIDE)
    store_state(d_initial, d_state, head, kk, vv, K, V)


@triton.jit
def kda_pairs(
    overlap, v, u, first, do, write, pull,
    T, J,
    dv, du, d_scores, d_overlap,
    H: tl.constexpr, V: tl.constexpr, C: tl.constexpr, VALUES: tl.constexpr, SCALE: tl.constexpr,
    HAS_U: tl.constexpr, HAS_DOCS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """dv (B, T, H, V); the gradients of Q K^T . D and, by way of beta K K^T . D, of K K^T . D (squares); what write strengths
    feel of pairs of the chunk and of v (B, H, T)."""
    c, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = b * H + h
    low: tl.constexpr = do.dtype.element_ty
    u_C = load_writes(u, head, c, T, C, HAS_U)
    du_C, by_query, by_key = by_pairs(do, write, pull, v, dv, u_C, b, c, h, T, H, V, C, VALUES, GATED, low)
    lower = visible(first, b, c, T, C, HAS_DOCS)
    by_key = -strictly_lower(tl.where(lower, by_key, 0.0), C)
    if GATED:
        du_C += tl.sum(by_key * load_square(overlap, head * J + c, C), axis=1)
        tl.store(du + head * T + c * C + tl.arange(0, C), du_C)
    store_square(d_scores, SCALE * tl.where(lower, by_query, 0.0), head * J + c, C)
    store_square(d_overlap, by_key * u_C[:, None], head * J + c, C)


@triton.jit
def kda_keys(
    q, k, coarse, fine, u, first, first_end, do, write, pull, states, d_states, d_scores, d_overlap,
    T, J,
    dq, dk, dg, du,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, SCALE: tl.constexpr, LEVELS: tl.constexpr,
    HAS_U: tl.constexpr, HAS_DOCS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """dq, dk and dg (B, T, H, K); what write strengths feel of reads (X, B, H, T). No sum of dg is a difference: a token feels
    the pairs, reads and writes that it lies between."""
    X: tl.constexpr = (K + KEYS - 1) // KEYS
    low: tl.constexpr = q.dtype.element_ty
    exact: tl.constexpr = low == tl.float32
    x, c = tl.program_id(0) % X, tl.program_id(0) // X
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head, hk = b * H + h, h // (H // HK)
    kk = x * KEYS + tl.arange(0, KEYS)
    read_q, read_k, left, passed = by_states(
        do, write, pull, states, d_states, b, c, h, kk, T, J, H, K, V, C, KEYS, VALUES, True, low
    )

    q_CK = load_tokens(q, b, c, hk, kk, T, HK, K, C).to(tl.float32)
    k_CK = load_tokens(k, b, c, hk, kk, T, HK, K, C).to(tl.float32)
    coarse_CK, fine_CK = load_tokens(coarse, b, c, h, kk, T, H, K, C), load_tokens(fine, b, c, h, kk, T, H, K, C)
    into, out, kept_K = borders(coarse_CK, fine_CK, coarse, fine, first, first_end, b, c, h, kk, T, J, H, K, C, HAS_DOCS)
    read_q *= SCALE * into
    read_k *= into
    if GATED:
        store_felt(du, -tl.sum(k_CK * read_k, axis=1), x, head, c, T, H, C)
    read_k *= -load_writes(u, head, c, T, C, HAS_U)[:, None]
    left *= out
    t = tl.arange(0, C)[:, None]
    other = tl.arange(0, C)[None, :]
    dg_CK = sum_rows(t <= other, q_CK * read_q + k_CK * read_k, exact) + sum_rows(t > other, k_CK * left, exact)
    dg_CK += (kept_K * passed)[None, :]

    by_query, by_key = load_square(d_scores, head * J + c, C), load_square(d_overlap, head * J + c, C)
    own = tl.sum(tl.where(t == other, by_query, 0.0), axis=1)[:, None]
    # Both are 0 above the diagonal. A key's row has what its queries' have in its column.
    by_query = tl.where(t > other, by_query, tl.trans(by_query))
    by_key = tl.where(t > other, by_key, tl.trans(by_key))
    dq_CK = own * k_CK + read_q
    dk_CK = own * q_CK + read_k + left
    for level in range(0, LEVELS):
        half = 1 << level
        right, x_CK, decay = halves(q_CK, k_CK, coarse_CK, fine_CK, coarse, fine, half, b, c, h, kk, T, H, K, C)
        meet = meets(half, C)
        dx_CK = decay * fine_dot(tl.where(meet, by_query, 0.0), x_CK * decay, low)
        dy_CK = decay * fine_dot(tl.where(meet, by_key, 0.0), k_CK * decay, low)
        dq_CK += tl.where(right, dx_CK, 0.0)
        dk_CK += tl.where(right, 0.0, dx_CK) + dy_CK
        dg_CK += sum_rows(ahead(half, C), x_CK * dx_CK + k_CK * dy_CK, exact)
    store_tokens(dq, dq_CK, b, c, h, kk, T, H, K, C)
    store_tokens(dk, dk_CK, b, c, h, kk, T, H, K, C)
    store_tokens(dg, dg_CK, b, c, h, kk, T, H, K, C)
