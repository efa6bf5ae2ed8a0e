"""Triton kernels of the add rule with no decay or one decay a head. Programs are (slab, value head, row) and walk over chunks.

`forward` and `values` own a slab of V and all of K, `queries` and `keys` a slab of K and all of V; slabs of a sum over the
other dim are added up outside. q, k (B, T, Hk, K); v (B, T, H, V); by head (B, H, T) float32: write strengths u, and sums of
log decays as a coarse part and a rest (see `_kernel_inputs.decay_sums`); first (B, T) and first_end (B, J) int32: see
`_kernel_inputs.Documents`. T is J chunks of C tokens (i as query, j as key).
"""

import os

import triton
import triton.language as tl

INTERPRETED: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _dot(a, b):
    """Product accumulated in float32; float32 tiles are multiplied as three TF32 products (22 bits)."""
    if INTERPRETED:  # Its product reads bfloat16 as integers.
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    if a.dtype == tl.float32:
        return tl.dot(a, b, input_precision="tf32x3")
    return tl.dot(a, b)


@triton.jit
def _tokens(x, b, c, h, d, T, heads: tl.constexpr, D: tl.constexpr, C: tl.constexpr):
    """(C, len(d)) of x (B, T, heads, D)."""
    at = tl.arange(0, C)[:, None] * (heads * D) + d[None, :]
    return tl.load(x + ((b * T + c * C) * heads + h) * D + at, mask=(d < D)[None, :], other=0.0)


@triton.jit
def _store_tokens(x, value, b, c, h, d, T, heads: tl.constexpr, D: tl.constexpr, C: tl.constexpr):
    at = tl.arange(0, C)[:, None] * (heads * D) + d[None, :]
    tl.store(x + ((b * T + c * C) * heads + h) * D + at, value.to(x.dtype.element_ty), mask=(d < D)[None, :])


@triton.jit
def _state(x, n, k, v, K: tl.constexpr, V: tl.constexpr):
    """(len(k), len(v)) of the n-th state of x (..., K, V)."""
    mask = (k < K)[:, None] & (v < V)[None, :]
    return tl.load(x + n * (K * V) + k[:, None] * V + v[None, :], mask=mask, other=0.0)


@triton.jit
def _store_state(x, value, n, k, v, K: tl.constexpr, V: tl.constexpr):
    mask = (k < K)[:, None] & (v < V)[None, :]
    tl.store(x + n * (K * V) + k[:, None] * V + v[None, :], value, mask=mask)


@triton.jit
def _writes(u, head, c, T, C: tl.constexpr, HAS_U: tl.constexpr):
    if HAS_U:
        return tl.load(u + head * T + c * C + tl.arange(0, C))
    return tl.full((C,), 1.0, tl.float32)


@triton.jit
def _group(b, c, h, J, H: tl.constexpr, STRIDE: tl.constexpr):
    """Which state of (B, N, H, K, V) belongs to the group of STRIDE chunks that chunk c is in."""
    return (b * tl.cdiv(J, STRIDE) + c // STRIDE) * H + h


@triton.jit
def _ends_group(c, J, STRIDE: tl.constexpr):
    return ((c + 1) % STRIDE == 0) | (c + 1 == J)


@triton.jit
def _with_cotangent(d_state, d_states, b, c, h, k, v, J, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, STRIDE: tl.constexpr):
    """d_state and, if a group begins with chunk c, the cotangent of the state that the caller was given there."""
    if c % STRIDE == 0:
        d_state += _state(d_states, _group(b, c, h, J, H, STRIDE), k, v, K, V)
    return d_state


@triton.jit
def _scaled(x, by):
    """Rows of x times a factor each, in the dtype of x."""
    return (x.to(tl.float32) * by[:, None]).to(x.dtype)


@triton.jit
def _factors(
    coarse,
    fine,
    first,
    first_end,
    b,
    head,
    c,
    T,
    J,
    C: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_DOCS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Decays of one chunk and head: (C, C) from j to i, 0 where they do not meet, as (j, i) if TRANSPOSED; from the chunk's
    start to i; from j to its end; of the state that entered. The last three are 0 across a document border."""
    place = tl.arange(0, C)
    lower = place[None, :] >= place[:, None] if TRANSPOSED else place[:, None] >= place[None, :]
    carried = place >= 0
    last = place >= 0
    survives = c >= 0
    if HAS_DOCS:
        begin = tl.load(first + b * T + c * C + place)
        begin_end = tl.load(first_end + b * J + c)
        lower = lower & ((begin[None, :] <= place[:, None]) if TRANSPOSED else (begin[:, None] <= place[None, :]))
        carried = begin < 0
        last = place >= begin_end
        survives = begin_end < 0
    if HAS_G:
        row = head * T + c * C
        coarse_C, fine_C = tl.load(coarse + row + place), tl.load(fine + row + place)
        coarse_end, fine_end = tl.load(coarse + row + C - 1), tl.load(fine + row + C - 1)
        if TRANSPOSED:
            between = (coarse_C[None, :] - coarse_C[:, None]) + (fine_C[None, :] - fine_C[:, None])
        else:
            between = (coarse_C[:, None] - coarse_C[None, :]) + (fine_C[:, None] - fine_C[None, :])
        pair = tl.exp(tl.where(lower, between, float("-inf")))
        into = tl.exp(tl.where(carried, coarse_C + fine_C, float("-inf")))
        out = tl.exp(tl.where(last, (coarse_end - coarse_C) + (fine_end - fine_C), float("-inf")))
        kept = tl.exp(tl.where(survives, coarse_end + fine_end, float("-inf")))
    else:
        pair = tl.where(lower, 1.0, 0.0)
        into = tl.where(carried, 1.0, 0.0)
        out = tl.where(last, 1.0, 0.0)
        kept = tl.where(survives, 1.0, 0.0)
    return pair, into, out, kept


@triton.jit
def forward(
    q,
    k,
    v,
    coarse,
    fine,
    u,
    first,
    first_end,
    initial,
    T,
    J,
    o,
    final,
    states,
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
):
    """o, the final state, and with STRIDE > 0 the states entering every STRIDE-th chunk."""
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
                _store_state(states, state, _group(b, c, h, J, H, STRIDE), kk, vv, K, V)
        q_CK = _tokens(q, b, c, hk, kk, T, HK, K, C)
        k_CK = _tokens(k, b, c, hk, kk, T, HK, K, C)
        v_CV = _tokens(v, b, c, h, vv, T, H, V, C)
        u_C = _writes(u, head, c, T, C, HAS_U)
        pair, into, out, kept = _factors(coarse, fine, first, first_end, b, head, c, T, J, C, HAS_G, HAS_DOCS, False)
        scores = _dot(q_CK, tl.trans(k_CK)) * pair * u_C[None, :]
        o_CV = _dot(scores.to(v_CV.dtype), v_CV) + into[:, None] * _dot(q_CK, state.to(q_CK.dtype))
        _store_tokens(o, SCALE * o_CV, b, c, h, vv, T, H, V, C)
        written = _scaled(v_CV, u_C * out)
        state = kept * state + _dot(tl.trans(k_CK), written)
    _store_state(final, state, head, kk, vv, K, V)


@triton.jit
def queries(
    q,
    k,
    v,
    coarse,
    fine,
    u,
    first,
    first_end,
    initial,
    do,
    T,
    J,
    dq,
    reads,
    pairs,
    anchors,
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
):
    """dq (B, T, H, K); of decays (X, B, H, T): what reads of the entering state feel, and pairs inside a chunk; and the state
    that enters the last of every STRIDE chunks."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = b * H + h
    hk = h // (H // HK)
    kk = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    vv = tl.arange(0, VALUES)
    place = tl.arange(0, C)
    state = tl.zeros((KEYS, VALUES), tl.float32)
    if HAS_INITIAL:
        state = _state(initial, head, kk, vv, K, V)
    for c in range(0, J):
        if HAS_G:  # noqa: SIM102
            if _ends_group(c, J, STRIDE):
                _store_state(anchors, state, _group(b, c, h, J, H, STRIDE), kk, vv, K, V)
        k_CK = _tokens(k, b, c, hk, kk, T, HK, K, C)
        v_CV = _tokens(v, b, c, h, vv, T, H, V, C)
        do_CV = _tokens(do, b, c, h, vv, T, H, V, C)
        u_C = _writes(u, head, c, T, C, HAS_U)
        pair, into, out, kept = _factors(coarse, fine, first, first_end, b, head, c, T, J, C, HAS_G, HAS_DOCS, False)
        d_scores = SCALE * _dot(do_CV, tl.trans(v_CV)) * pair * u_C[None, :]
        inter = SCALE * into[:, None] * _dot(do_CV, tl.trans(state.to(do_CV.dtype)))
        _store_tokens(dq, _dot(d_scores.to(k_CK.dtype), k_CK) + inter, b, c, h, kk, T, H, K, C)
        if HAS_G:
            q_CK = _tokens(q, b, c, hk, kk, T, HK, K, C)
            # Pair by pair, j < t <= i: by way of sums over all queries or keys it were a small difference of large numbers.
            weight = tl.where(place[:, None] > place[None, :], d_scores * _dot(q_CK, tl.trans(k_CK)), 0.0)
            earlier = tl.cumsum(weight, axis=1) - weight
            felt = tl.sum(tl.where(place[:, None] >= place[None, :], earlier, 0.0), axis=0)
            part = (tl.program_id(0) * tl.num_programs(2) * H + head) * T + c * C + place
            tl.store(reads + part, tl.sum(q_CK.to(tl.float32) * inter, axis=1))
            tl.store(pairs + part, felt)
        written = _scaled(v_CV, u_C * out)
        state = kept * state + _dot(tl.trans(k_CK), written)


@triton.jit
def keys(
    q,
    k,
    v,
    coarse,
    fine,
    u,
    first,
    first_end,
    do,
    d_final,
    d_states,
    T,
    J,
    dk,
    writes,
    d_anchors,
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
    HAS_FINAL: tl.constexpr,
    HAS_STATES: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """dk (B, T, H, K); what decays feel of writes (X, B, H, T); and the cotangent of the state that leaves the last of every
    STRIDE chunks. Walks backwards."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = b * H + h
    hk = h // (H // HK)
    kk = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    vv = tl.arange(0, VALUES)
    part = tl.program_id(0) * tl.num_programs(2) * H + head
    d_state = tl.zeros((KEYS, VALUES), tl.float32)
    if HAS_FINAL:
        d_state = _state(d_final, head, kk, vv, K, V)
    for step in range(0, J):
        c = J - 1 - step
        if HAS_G:  # noqa: SIM102
            if _ends_group(c, J, STRIDE):
                _store_state(d_anchors, d_state, _group(b, c, h, J, H, STRIDE), kk, vv, K, V)
        q_CK = _tokens(q, b, c, hk, kk, T, HK, K, C)
        v_CV = _tokens(v, b, c, h, vv, T, H, V, C)
        do_CV = _tokens(do, b, c, h, vv, T, H, V, C)
        u_C = _writes(u, head, c, T, C, HAS_U)
        pair, into, out, kept = _factors(coarse, fine, first, first_end, b, head, c, T, J, C, HAS_G, HAS_DOCS, True)
        d_scores = SCALE * _dot(v_CV, tl.trans(do_CV)) * pair * u_C[:, None]
        inter = (u_C * out)[:, None] * _dot(v_CV, tl.trans(d_state.to(v_CV.dtype)))
        _store_tokens(dk, _dot(d_scores.to(q_CK.dtype), q_CK) + inter, b, c, h, kk, T, H, K, C)
        if HAS_G:
            k_CK = _tokens(k, b, c, hk, kk, T, HK, K, C)
            tl.store(writes + part * T + c * C + tl.arange(0, C), tl.sum(k_CK.to(tl.float32) * inter, axis=1))
        read = _scaled(do_CV, SCALE * into)
        d_state = kept * d_state + _dot(tl.trans(q_CK), read)
        if HAS_STATES:
            d_state = _with_cotangent(d_state, d_states, b, c, h, kk, vv, J, H, K, V, STRIDE)


@triton.jit
def values(
    q,
    k,
    v,
    coarse,
    fine,
    u,
    first,
    first_end,
    do,
    d_final,
    d_states,
    T,
    J,
    dv,
    du,
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
    HAS_FINAL: tl.constexpr,
    HAS_STATES: tl.constexpr,
    STRIDE: tl.constexpr,
    GATED: tl.constexpr,
):
    """dv (B, T, H, V); if GATED what write strengths feel (X, B, H, T); the cotangent of the initial state. Walks backwards."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = b * H + h
    hk = h // (H // HK)
    kk = tl.arange(0, KEYS)
    vv = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    part = tl.program_id(0) * tl.num_programs(2) * H + head
    d_state = tl.zeros((KEYS, VALUES), tl.float32)
    if HAS_FINAL:
        d_state = _state(d_final, head, kk, vv, K, V)
    for step in range(0, J):
        c = J - 1 - step
        q_CK = _tokens(q, b, c, hk, kk, T, HK, K, C)
        k_CK = _tokens(k, b, c, hk, kk, T, HK, K, C)
        do_CV = _tokens(do, b, c, h, vv, T, H, V, C)
        pair, into, out, kept = _factors(coarse, fine, first, first_end, b, head, c, T, J, C, HAS_G, HAS_DOCS, True)
        scores = SCALE * _dot(k_CK, tl.trans(q_CK)) * pair
        d_write = _dot(scores.to(do_CV.dtype), do_CV) + out[:, None] * _dot(k_CK, d_state.to(k_CK.dtype))
        u_C = _writes(u, head, c, T, C, HAS_U)
        _store_tokens(dv, u_C[:, None] * d_write, b, c, h, vv, T, H, V, C)
        if GATED:
            v_CV = _tokens(v, b, c, h, vv, T, H, V, C).to(tl.float32)
            tl.store(du + part * T + c * C + tl.arange(0, C), tl.sum(v_CV * d_write, axis=1))
        read = _scaled(do_CV, SCALE * into)
        d_state = kept * d_state + _dot(tl.trans(q_CK), read)
        if HAS_STATES:
            d_state = _with_cotangent(d_state, d_states, b, c, h, kk, vv, J, H, K, V, STRIDE)
    _store_state(d_initial, d_state, head, kk, vv, K, V)
