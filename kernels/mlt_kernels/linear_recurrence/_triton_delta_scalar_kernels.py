"""Delta rule in Triton, the kernels of no decay or one decay a head (DeltaNet, gated delta).

In a chunk entered with state S, with T the inverse that `delta_solve` left, D decays between tokens, G their sums since the
chunk or the document began, all of them 0 where tokens do not meet,

    W  = (T . D) beta (V - exp(G) K S)                    what is written
    O  = scale (exp(G) Q S + (Q K^T . D) W)
    S' = exp(G_end) S + (exp(G_end - G) K)^T W

and with dO and dS' the cotangents of O and S',

    dW  = scale (Q K^T . D)^T dO + exp(G_end - G) K dS'
    X   = (T . D)^T dW                                    the gradient of beta (V - reads)
    dS  = exp(G_end) dS' + scale (exp(G) Q)^T dO - (exp(G) K)^T beta X

The inverse itself is never differentiated: its matrix I + S . D has the gradient -X W^T. `delta_run` and `delta_reverse` walk
over the chunks and own a slab of V and all of K; `delta_pairs` and `delta_keys` take one chunk each. Arrays and letters are
those of `_triton_kernels`; states by chunk are (B, J, H, K, V), squares (B, H, J, C, C).
"""

import triton
import triton.language as tl

from mlt_kernels.linear_recurrence._triton_kernels import (
    _dot,
    _factors,
    _state,
    _store_state,
    _store_tokens,
    _tokens,
    _writes,
)


@triton.jit
def _square(x, n, C: tl.constexpr):
    """The n-th of x (..., C, C)."""
    place = tl.arange(0, C)
    return tl.load(x + n * (C * C) + place[:, None] * C + place[None, :])


@triton.jit
def _store_square(x, value, n, C: tl.constexpr):
    place = tl.arange(0, C)
    tl.store(x + n * (C * C) + place[:, None] * C + place[None, :], value.to(x.dtype.element_ty))


@triton.jit
def _strictly(x, C: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The part of x (i, j) below the diagonal; TRANSPOSED: of x (j, i)."""
    place = tl.arange(0, C)
    before = place[:, None] < place[None, :] if TRANSPOSED else place[None, :] < place[:, None]
    return tl.where(before, x, 0.0)


@triton.jit
def _solved(inverse, strict, right, REFINE: tl.constexpr):
    """(I + S)^-1 R, refined once with REFINE. The stored inverse is right to float32, yet where keys repeat a product with it
    loses more to rounding than substitution would."""
    solution = _dot(inverse, right.to(inverse.dtype))
    if REFINE:
        solution += _dot(inverse, right - solution - _dot(strict, solution))
    return solution


@triton.jit
def delta_run(
    q,
    k,
    v,
    coarse,
    fine,
    u,
    first,
    first_end,
    inverse,
    initial,
    T,
    J,
    o,
    final,
    states,
    write,
    H: tl.constexpr,
    HK: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_U: tl.constexpr,
    HAS_DOCS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    STRIDE: tl.constexpr,
    OUTPUT: tl.constexpr,
    REFINE: tl.constexpr,
):
    """With OUTPUT o and the final state, else all that is written, W (B, T, H, V); with STRIDE > 0 the states that enter every
    STRIDE-th chunk."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = b * H + h
    hk = h // (H // HK)
    kk = tl.arange(0, KEYS)
    vv = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    state = tl.zeros((KEYS, VALUES), tl.float32)
    if HAS_INITIAL:
        state = _state(initial, head, kk, vv, K, V)
    for c in range(0, J):
        if STRIDE > 0:  # noqa: SIM102
            if c % STRIDE == 0:
                _store_state(states, state, (b * tl.cdiv(J, STRIDE) + c // STRIDE) * H + h, kk, vv, K, V)
        k_CK = _tokens(k, b, c, hk, kk, T, HK, K, C)
        v_CV = _tokens(v, b, c, h, vv, T, H, V, C)
        u_C = _writes(u, head, c, T, C, HAS_U)
        pair, into, out, kept = _factors(coarse, fine, first, first_end, b, head, c, T, J, C, HAS_G, HAS_DOCS, False)
        low_state = state.to(k_CK.dtype)
        inverse_CC = (_square(inverse, head * J + c, C) * pair).to(k_CK.dtype)
        strict_CC = inverse_CC
        if REFINE:
            strict_CC = _strictly(_dot(k_CK, tl.trans(k_CK)) * pair * u_C[:, None], C, False)
        right_CV = u_C[:, None] * (v_CV.to(tl.float32) - into[:, None] * _dot(k_CK, low_state))
        write_CV = _solved(inverse_CC, strict_CC, right_CV, REFINE)
        if OUTPUT:
            q_CK = _tokens(q, b, c, hk, kk, T, HK, K, C)
            scores = (_dot(q_CK, tl.trans(k_CK)) * pair).to(k_CK.dtype)
            o_CV = into[:, None] * _dot(q_CK, low_state) + _dot(scores, write_CV.to(k_CK.dtype))
            _store_tokens(o, SCALE * o_CV, b, c, h, vv, T, H, V, C)
        else:
            _store_tokens(write, write_CV, b, c, h, vv, T, H, V, C)
        state = kept * state + _dot(tl.trans(k_CK), (write_CV * out[:, None]).to(k_CK.dtype))
    if OUTPUT:
        _store_state(final, state, head, kk, vv, K, V)


@triton.jit
def delta_reverse(
    q,
    k,
    coarse,
    fine,
    u,
    first,
    first_end,
    inverse,
    do,
    d_final,
    d_entering,
    T,
    J,
    pull,
    d_states,
    d_initial,
    H: tl.constexpr,
    HK: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_U: tl.constexpr,
    HAS_DOCS: tl.constexpr,
    HAS_STATES: tl.constexpr,
    STRIDE: tl.constexpr,
    REFINE: tl.constexpr,
):
    """X (B, T, H, V), the cotangents of the states that leave the chunks, and that of the initial state. Walks backwards."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = b * H + h
    hk = h // (H // HK)
    kk = tl.arange(0, KEYS)
    vv = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    d_state = _state(d_final, head, kk, vv, K, V)
    for step in range(0, J):
        c = J - 1 - step
        _store_state(d_states, d_state, (b * J + c) * H + h, kk, vv, K, V)
        q_CK = _tokens(q, b, c, hk, kk, T, HK, K, C)
        k_CK = _tokens(k, b, c, hk, kk, T, HK, K, C)
        do_CV = _tokens(do, b, c, h, vv, T, H, V, C)
        u_C = _writes(u, head, c, T, C, HAS_U)
        pair, into, out, kept = _factors(coarse, fine, first, first_end, b, head, c, T, J, C, HAS_G, HAS_DOCS, True)
        scores = (SCALE * _dot(k_CK, tl.trans(q_CK)) * pair).to(k_CK.dtype)
        d_write = _dot(scores, do_CV) + out[:, None] * _dot(k_CK, d_state.to(k_CK.dtype))
        inverse_CC = (tl.trans(_square(inverse, head * J + c, C)) * pair).to(k_CK.dtype)
        strict_CC = inverse_CC
        if REFINE:
            strict_CC = _strictly(_dot(k_CK, tl.trans(k_CK)) * pair * u_C[None, :], C, True)
        pull_CV = _solved(inverse_CC, strict_CC, d_write, REFINE)
        _store_tokens(pull, pull_CV, b, c, h, vv, T, H, V, C)
        read = (do_CV.to(tl.float32) * (SCALE * into)[:, None]).to(k_CK.dtype)
        taken = (pull_CV * (u_C * into)[:, None]).to(k_CK.dtype)
        d_state = kept * d_state + _dot(tl.trans(q_CK), read) - _dot(tl.trans(k_CK), taken)
        if HAS_STATES:  # noqa: SIM102
            if c % STRIDE == 0:
                d_state += _state(d_entering, (b * tl.cdiv(J, STRIDE) + c // STRIDE) * H + h, kk, vv, K, V)
    _store_state(d_initial, d_state, head, kk, vv, K, V)


@triton.jit
def delta_pairs(
    q,
    k,
    v,
    coarse,
    fine,
    u,
    first,
    first_end,
    do,
    write,
    pull,
    T,
    J,
    dv,
    du,
    pairs,
    d_scores,
    d_overlap,
    H: tl.constexpr,
    HK: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_U: tl.constexpr,
    HAS_DOCS: tl.constexpr,
    GATED: tl.constexpr,
):
    """dv (B, T, H, V); the gradients of Q K^T and, by way of S, of K K^T (squares); what decays (pairs) and write strengths (du)
    feel of pairs of the chunk and of v (B, H, T). Programs are (chunk, head, row)."""
    c, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = b * H + h
    hk = h // (H // HK)
    place = tl.arange(0, C)
    u_C = _writes(u, head, c, T, C, HAS_U)
    du_C = tl.zeros((C,), tl.float32)
    by_query = tl.zeros((C, C), tl.float32)
    by_key = tl.zeros((C, C), tl.float32)
    for at in range(0, V, VALUES):
        vv = at + tl.arange(0, VALUES)
        do_CV = _tokens(do, b, c, h, vv, T, H, V, C)
        write_CV = _tokens(write, b, c, h, vv, T, H, V, C)
        pull_CV = _tokens(pull, b, c, h, vv, T, H, V, C)
        _store_tokens(dv, u_C[:, None] * pull_CV, b, c, h, vv, T, H, V, C)
        if GATED:
            v_CV = _tokens(v, b, c, h, vv, T, H, V, C).to(tl.float32)
            du_C += tl.sum(v_CV * pull_CV, axis=1)
        by_query += _dot(do_CV, tl.trans(write_CV))
        by_key += _dot(pull_CV, tl.trans(write_CV))
    pair, _, _, _ = _factors(coarse, fine, first, first_end, b, head, c, T, J, C, HAS_G, HAS_DOCS, False)
    by_query = SCALE * by_query * pair
    by_key = -_strictly(by_key * pair, C, False)
    if HAS_G or GATED:
        scores = tl.zeros((C, C), tl.float32)
        overlap = tl.zeros((C, C), tl.float32)
        for at in range(0, K, KEYS):
            kk = at + tl.arange(0, KEYS)
            k_CK = _tokens(k, b, c, hk, kk, T, HK, K, C)
            overlap += _dot(k_CK, tl.trans(k_CK))
            if HAS_G:
                scores += _dot(_tokens(q, b, c, hk, kk, T, HK, K, C), tl.trans(k_CK))
        overlap *= by_key
        at_T = head * T + c * C + place
        if GATED:
            tl.store(du + at_T, du_C + tl.sum(overlap, axis=1))
        if HAS_G:
            # Pair by pair, j < t <= i: by way of sums over all queries or keys it were a small difference of large numbers.
            weight = _strictly(by_query * scores, C, False) + overlap * u_C[:, None]
            earlier = tl.cumsum(weight, axis=1) - weight
            tl.store(pairs + at_T, tl.sum(tl.where(place[:, None] >= place[None, :], earlier, 0.0), axis=0))
    _store_square(d_scores, by_query, head * J + c, C)
    _store_square(d_overlap, by_key * u_C[:, None], head * J + c, C)


@triton.jit
def delta_keys(
    q,
    k,
    coarse,
    fine,
    u,
    first,
    first_end,
    do,
    write,
    pull,
    states,
    d_states,
    d_scores,
    d_overlap,
    T,
    J,
    dq,
    dk,
    du,
    reads,
    writes,
    through,
    H: tl.constexpr,
    HK: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_U: tl.constexpr,
    HAS_DOCS: tl.constexpr,
    GATED: tl.constexpr,
):
    """dq and dk (B, T, H, K); what write strengths feel of reads (du), and decays of reads, of writes (X, B, H, T) and of the
    state that passes the chunk (X, B, H, J). Programs are (chunk and slab of K, head, row)."""
    X: tl.constexpr = (K + KEYS - 1) // KEYS
    x, c = tl.program_id(0) % X, tl.program_id(0) // X
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = b * H + h
    hk = h // (H // HK)
    kk = x * KEYS + tl.arange(0, KEYS)
    read_q = tl.zeros((C, KEYS), tl.float32)
    read_k = tl.zeros((C, KEYS), tl.float32)
    left = tl.zeros((C, KEYS), tl.float32)
    passed = tl.zeros((KEYS,), tl.float32)
    for at in range(0, V, VALUES):
        vv = at + tl.arange(0, VALUES)
        do_CV = _tokens(do, b, c, h, vv, T, H, V, C)
        write_CV = _tokens(write, b, c, h, vv, T, H, V, C)
        pull_CV = _tokens(pull, b, c, h, vv, T, H, V, C)
        state = _state(states, (b * J + c) * H + h, kk, vv, K, V)
        d_state = _state(d_states, (b * J + c) * H + h, kk, vv, K, V)
        read_q += _dot(do_CV, tl.trans(state))
        read_k += _dot(pull_CV, tl.trans(state))
        left += _dot(write_CV, tl.trans(d_state))
        if HAS_G:
            passed += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), axis=1)
    _, into, out, kept = _factors(coarse, fine, first, first_end, b, head, c, T, J, C, HAS_G, HAS_DOCS, False)
    u_C = _writes(u, head, c, T, C, HAS_U)
    read_q *= (SCALE * into)[:, None]
    read_k *= into[:, None]
    left *= out[:, None]
    q_CK = _tokens(q, b, c, hk, kk, T, HK, K, C)
    k_CK = _tokens(k, b, c, hk, kk, T, HK, K, C)
    part = (x * tl.num_programs(2) * H + head) * T + c * C + tl.arange(0, C)
    if HAS_G or GATED:
        k_by_read = tl.sum(k_CK.to(tl.float32) * read_k, axis=1)
        if GATED:
            tl.store(du + part, -k_by_read)
        if HAS_G:
            tl.store(reads + part, tl.sum(q_CK.to(tl.float32) * read_q, axis=1) - u_C * k_by_read)
            tl.store(writes + part, tl.sum(k_CK.to(tl.float32) * left, axis=1))
            tl.store(through + (x * tl.num_programs(2) * H + head) * J + c, kept * tl.sum(passed, axis=0))
    by_query = _square(d_scores, head * J + c, C)
    _store_tokens(dq, read_q + _dot(by_query, k_CK), b, c, h, kk, T, H, K, C)
    by_key = _square(d_overlap, head * J + c, C)
    place = tl.arange(0, C)
    both = tl.where(place[:, None] > place[None, :], by_key, tl.trans(by_key))
    d_k = left - u_C[:, None] * read_k + _dot(tl.trans(by_query), q_CK) + _dot(both, k_CK)
    _store_tokens(dk, d_k, b, c, h, kk, T, H, K, C)
