"""Delta rule in Triton, the kernels of one decay a head and key dim (KDA).

The equations are those of `_triton_delta_scalar_kernels` with decays inside the products: `kda_prepare` makes Q K^T . D and
K K^T . D by the levels of `_triton_levels`, where every exponent is at most 0, and moves q and k to the chunk's borders:

    q_into = exp(G) Q    k_into = exp(G) K    k_out = exp(G_end - G) K    kept = exp(G_end)

all of them 0 across a document border. `delta_invert` makes T = (I + beta K K^T . D)^-1 of that, and the walks go

    W  = T beta (V - k_into S)      O  = scale (q_into S + (Q K^T . D) W)      S' = kept S + k_out^T W
    X  = T^T (scale (Q K^T . D)^T dO + k_out dS')      dS = kept dS' + scale q_into^T dO - k_into^T beta X

`kda_run` and `kda_reverse` own a slab of V and all of K, `kda_pairs` takes one chunk, `kda_keys` one chunk and slab of K. Arrays
and letters are those of `_triton_vector_kernels`; states by chunk are (B, J, H, K, V), squares (B, H, J, C, C).
"""

import triton
import triton.language as tl

from mlt_kernels.linear_recurrence._triton_delta_scalar_kernels import _solved, _square, _store_square, _strictly
from mlt_kernels.linear_recurrence._triton_kernels import _dot, _state, _store_state, _store_tokens, _tokens, _writes
from mlt_kernels.linear_recurrence._triton_levels import _between, _borders, _level, _lower, _meet


@triton.jit
def kda_prepare(
    q,
    k,
    coarse,
    fine,
    first,
    first_end,
    T,
    J,
    scores,
    overlap,
    q_into,
    k_into,
    k_out,
    kept,
    H: tl.constexpr,
    HK: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    KEYS: tl.constexpr,
    LEVELS: tl.constexpr,
    HAS_DOCS: tl.constexpr,
):
    """What the walks read, in the dtype of q but for overlap and kept (float32). overlap is 0 on the diagonal."""
    c, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    hk = h // (H // HK)
    low: tl.constexpr = q.dtype.element_ty
    place = tl.arange(0, C)
    own = place[:, None] == place[None, :]
    scores_CC = tl.zeros((C, C), tl.float32)
    overlap_CC = tl.zeros((C, C), tl.float32)
    for at in range(0, K, KEYS):
        kk = at + tl.arange(0, KEYS)
        q_CK = _tokens(q, b, c, hk, kk, T, HK, K, C).to(tl.float32)
        k_CK = _tokens(k, b, c, hk, kk, T, HK, K, C).to(tl.float32)
        coarse_CK, fine_CK = _tokens(coarse, b, c, h, kk, T, H, K, C), _tokens(fine, b, c, h, kk, T, H, K, C)
        scores_CC += tl.where(own, tl.sum(q_CK * k_CK, axis=1)[:, None], 0.0)
        for level in range(0, LEVELS):
            half = 1 << level
            _, x_CK, decay = _level(q_CK, k_CK, coarse_CK, fine_CK, coarse, fine, half, b, c, h, kk, T, H, K, C)
            x_CK, y_CK = (x_CK * decay).to(low), (k_CK * decay).to(low)
            meet = _meet(half, C)
            scores_CC += tl.where(meet, _dot(x_CK, tl.trans(y_CK)), 0.0)
            overlap_CC += tl.where(meet, _dot(y_CK, tl.trans(y_CK)), 0.0)
        into, out, kept_K = _borders(coarse_CK, fine_CK, coarse, fine, first, first_end, b, c, h, kk, T, J, H, K, C, HAS_DOCS)
        _store_tokens(q_into, q_CK * into, b, c, h, kk, T, H, K, C)
        _store_tokens(k_into, k_CK * into, b, c, h, kk, T, H, K, C)
        _store_tokens(k_out, k_CK * out, b, c, h, kk, T, H, K, C)
        tl.store(kept + ((b * J + c) * H + h) * K + kk, kept_K, mask=kk < K)
    lower = _lower(first, b, c, T, C, HAS_DOCS)
    _store_square(scores, tl.where(lower, scores_CC, 0.0), (b * H + h) * J + c, C)
    _store_square(overlap, _strictly(tl.where(lower, overlap_CC, 0.0), C, False), (b * H + h) * J + c, C)


@triton.jit
def _kept(kept, b, c, h, kk, J, H: tl.constexpr, K: tl.constexpr):
    """(len(kk), 1): what is left of a state after chunk c."""
    return tl.load(kept + ((b * J + c) * H + h) * K + kk, mask=kk < K, other=0.0)[:, None]


@triton.jit
def kda_run(
    scores,
    overlap,
    q_into,
    k_into,
    k_out,
    kept,
    inverse,
    v,
    u,
    initial,
    T,
    J,
    o,
    final,
    states,
    write,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_U: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    STRIDE: tl.constexpr,
    OUTPUT: tl.constexpr,
    REFINE: tl.constexpr,
):
    """With OUTPUT o and the final state, else all that is written, W (B, T, H, V); with STRIDE > 0 the states that enter every
    STRIDE-th chunk."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = b * H + h
    kk = tl.arange(0, KEYS)
    vv = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    state = tl.zeros((KEYS, VALUES), tl.float32)
    if HAS_INITIAL:
        state = _state(initial, head, kk, vv, K, V)
    for c in range(0, J):
        if STRIDE > 0:  # noqa: SIM102
            if c % STRIDE == 0:
                _store_state(states, state, (b * tl.cdiv(J, STRIDE) + c // STRIDE) * H + h, kk, vv, K, V)
        v_CV = _tokens(v, b, c, h, vv, T, H, V, C)
        u_C = _writes(u, head, c, T, C, HAS_U)
        low_state = state.to(v_CV.dtype)
        inverse_CC = _square(inverse, head * J + c, C)
        strict_CC = inverse_CC
        if REFINE:
            strict_CC = _square(overlap, head * J + c, C) * u_C[:, None]
        right_CV = u_C[:, None] * (v_CV.to(tl.float32) - _dot(_tokens(k_into, b, c, h, kk, T, H, K, C), low_state))
        write_CV = _solved(inverse_CC, strict_CC, right_CV, REFINE).to(v_CV.dtype)
        if OUTPUT:
            o_CV = _dot(_tokens(q_into, b, c, h, kk, T, H, K, C), low_state)
            o_CV += _dot(_square(scores, head * J + c, C), write_CV)
            _store_tokens(o, SCALE * o_CV, b, c, h, vv, T, H, V, C)
        else:
            _store_tokens(write, write_CV, b, c, h, vv, T, H, V, C)
        k_CK = _tokens(k_out, b, c, h, kk, T, H, K, C)
        state = _kept(kept, b, c, h, kk, J, H, K) * state + _dot(tl.trans(k_CK), write_CV)
    if OUTPUT:
        _store_state(final, state, head, kk, vv, K, V)


@triton.jit
def kda_reverse(
    scores,
    overlap,
    q_into,
    k_into,
    k_out,
    kept,
    inverse,
    u,
    do,
    d_final,
    d_entering,
    T,
    J,
    pull,
    d_states,
    d_initial,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_U: tl.constexpr,
    HAS_STATES: tl.constexpr,
    STRIDE: tl.constexpr,
    REFINE: tl.constexpr,
):
    """X (B, T, H, V), the cotangents of the states that leave the chunks, and that of the initial state. Walks backwards."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = b * H + h
    kk = tl.arange(0, KEYS)
    vv = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    d_state = _state(d_final, head, kk, vv, K, V)
    for step in range(0, J):
        c = J - 1 - step
        _store_state(d_states, d_state, (b * J + c) * H + h, kk, vv, K, V)
        do_CV = _tokens(do, b, c, h, vv, T, H, V, C)
        u_C = _writes(u, head, c, T, C, HAS_U)
        d_write = SCALE * _dot(tl.trans(_square(scores, head * J + c, C)), do_CV)
        d_write += _dot(_tokens(k_out, b, c, h, kk, T, H, K, C), d_state.to(do_CV.dtype))
        inverse_CC = tl.trans(_square(inverse, head * J + c, C))
        strict_CC = inverse_CC
        if REFINE:
            strict_CC = tl.trans(_square(overlap, head * J + c, C)) * u_C[None, :]
        pull_CV = _solved(inverse_CC, strict_CC, d_write, REFINE)
        _store_tokens(pull, pull_CV, b, c, h, vv, T, H, V, C)
        d_state = _kept(kept, b, c, h, kk, J, H, K) * d_state
        d_state += SCALE * _dot(tl.trans(_tokens(q_into, b, c, h, kk, T, H, K, C)), do_CV)
        taken = (pull_CV * u_C[:, None]).to(do_CV.dtype)
        d_state -= _dot(tl.trans(_tokens(k_into, b, c, h, kk, T, H, K, C)), taken)
        if HAS_STATES:  # noqa: SIM102
            if c % STRIDE == 0:
                d_state += _state(d_entering, (b * tl.cdiv(J, STRIDE) + c // STRIDE) * H + h, kk, vv, K, V)
    _store_state(d_initial, d_state, head, kk, vv, K, V)


@triton.jit
def kda_pairs(
    overlap,
    v,
    u,
    first,
    do,
    write,
    pull,
    T,
    J,
    dv,
    du,
    d_scores,
    d_overlap,
    H: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    VALUES: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_U: tl.constexpr,
    HAS_DOCS: tl.constexpr,
    GATED: tl.constexpr,
):
    """dv (B, T, H, V); the gradients of Q K^T . D and, by way of beta K K^T . D, of K K^T . D (squares); what write strengths
    feel of pairs of the chunk and of v (B, H, T)."""
    c, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = b * H + h
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
    lower = _lower(first, b, c, T, C, HAS_DOCS)
    by_key = -_strictly(tl.where(lower, by_key, 0.0), C, False)
    if GATED:
        du_C += tl.sum(by_key * _square(overlap, head * J + c, C), axis=1)
        tl.store(du + head * T + c * C + tl.arange(0, C), du_C)
    _store_square(d_scores, SCALE * tl.where(lower, by_query, 0.0), head * J + c, C)
    _store_square(d_overlap, by_key * u_C[:, None], head * J + c, C)


@triton.jit
def kda_keys(
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
    dg,
    du,
    H: tl.constexpr,
    HK: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    SCALE: tl.constexpr,
    LEVELS: tl.constexpr,
    HAS_U: tl.constexpr,
    HAS_DOCS: tl.constexpr,
    GATED: tl.constexpr,
):
    """dq, dk and dg (B, T, H, K); what write strengths feel of reads (X, B, H, T). No sum of dg is a difference: a token feels
    the pairs, reads and writes that it lies between."""
    X: tl.constexpr = (K + KEYS - 1) // KEYS
    low: tl.constexpr = q.dtype.element_ty
    exact: tl.constexpr = low == tl.float32
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
        passed += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), axis=1)

    q_CK = _tokens(q, b, c, hk, kk, T, HK, K, C).to(tl.float32)
    k_CK = _tokens(k, b, c, hk, kk, T, HK, K, C).to(tl.float32)
    coarse_CK, fine_CK = _tokens(coarse, b, c, h, kk, T, H, K, C), _tokens(fine, b, c, h, kk, T, H, K, C)
    into, out, kept_K = _borders(coarse_CK, fine_CK, coarse, fine, first, first_end, b, c, h, kk, T, J, H, K, C, HAS_DOCS)
    read_q *= SCALE * into
    read_k *= into
    if GATED:
        part = (x * tl.num_programs(2) * H + head) * T + c * C + tl.arange(0, C)
        tl.store(du + part, -tl.sum(k_CK * read_k, axis=1))
    read_k *= -_writes(u, head, c, T, C, HAS_U)[:, None]
    left *= out
    t = tl.arange(0, C)[:, None]
    other = tl.arange(0, C)[None, :]
    dg_CK = _between(t <= other, q_CK * read_q + k_CK * read_k, exact) + _between(t > other, k_CK * left, exact)
    dg_CK += (kept_K * passed)[None, :]

    by_query, by_key = _square(d_scores, head * J + c, C), _square(d_overlap, head * J + c, C)
    own = tl.sum(tl.where(t == other, by_query.to(tl.float32), 0.0), axis=1)[:, None]
    # Both are 0 above the diagonal. A key's row has what its queries' have in its column.
    by_query = tl.where(t > other, by_query, tl.trans(by_query))
    by_key = tl.where(t > other, by_key, tl.trans(by_key))
    dq_CK = own * k_CK + read_q
    dk_CK = own * q_CK + read_k + left
    for level in range(0, LEVELS):
        half = 1 << level
        right, x_CK, decay = _level(q_CK, k_CK, coarse_CK, fine_CK, coarse, fine, half, b, c, h, kk, T, H, K, C)
        meet = _meet(half, C)
        dx_CK = decay * _dot(tl.where(meet, by_query, 0.0).to(low), (x_CK * decay).to(low))
        dy_CK = decay * _dot(tl.where(meet, by_key, 0.0).to(low), (k_CK * decay).to(low))
        dq_CK += tl.where(right, dx_CK, 0.0)
        dk_CK += tl.where(right, 0.0, dx_CK) + dy_CK
        # Of the same half: tokens up to a query, and those after a key.
        ahead = ((t ^ other) < half) & (((other & half) != 0) == (t <= other))
        dg_CK += _between(ahead, x_CK * dx_CK + k_CK * dy_CK, exact)
    _store_tokens(dq, dq_CK, b, c, h, kk, T, H, K, C)
    _store_tokens(dk, dk_CK, b, c, h, kk, T, H, K, C)
    _store_tokens(dg, dg_CK, b, c, h, kk, T, H, K, C)
