"""Triton kernels of the add rule with one decay a head and key dim.

The pairs inside a chunk are taken level by level, see `_triton_levels`.

q, k (B, T, Hk, K); v (B, T, H, V); q_into, k_out (B, T, H, K): q decayed from the chunk's start, k to its end, 0 across a
document border; kept (B, J, H, K): decays of a whole chunk; scores (B, H, T, C) without write strengths; coarse, fine
(B, T, H, K): see `sums`; u (B, H, T); first (B, T) and first_end (B, J) int32: see `_kernel_inputs.Documents`. T is J chunks of
C tokens (i as query, j as key). `sums`, `prepare` and `inner` take one chunk, the others walk over the chunks of a head.
"""

import triton
import triton.language as tl

from mlt_kernels.linear_recurrence._triton_kernels import (
    _dot,
    _ends_group,
    _group,
    _scaled,
    _state,
    _store_state,
    _store_tokens,
    _tokens,
    _with_cotangent,
    _writes,
)
from mlt_kernels.linear_recurrence._triton_levels import _between, _borders, _level, _lower, _meet


@triton.jit
def sums(
    g,
    place,
    T,
    coarse,
    fine,
    H: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    KEYS: tl.constexpr,
    GRID: tl.constexpr,
    HAS_DOCS: tl.constexpr,
):
    """Log decays g (B, T, H, K) summed since the chunk or the document began: coarse parts, multiples of 1 / GRID, whose sums
    and differences are exact, and the rest. place (B, T): first with padding told as what precedes it."""
    slabs: tl.constexpr = (K + KEYS - 1) // KEYS
    c, h, b = tl.program_id(0) // slabs, tl.program_id(1), tl.program_id(2).to(tl.int64)
    kk = tl.program_id(0) % slabs * KEYS + tl.arange(0, KEYS)
    i = tl.arange(0, C)
    within = i[:, None] >= i[None, :]
    if HAS_DOCS:
        within = within & (tl.load(place + b * T + c * C + i)[:, None] <= i[None, :])
    within = tl.where(within, 1.0, 0.0)
    g_CK = _tokens(g, b, c, h, kk, T, H, K, C)
    coarse_CK = tl.floor(g_CK * GRID + 0.5) / GRID
    _store_tokens(coarse, _dot(within, coarse_CK), b, c, h, kk, T, H, K, C)
    _store_tokens(fine, _dot(within, g_CK - coarse_CK), b, c, h, kk, T, H, K, C)


@triton.jit
def prepare(
    q,
    k,
    coarse,
    fine,
    first,
    first_end,
    T,
    J,
    scores,
    q_into,
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
    """What the walks read, in the dtype of q but for kept (float32)."""
    c, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    hk = h // (H // HK)
    place = tl.arange(0, C)
    own = place[:, None] == place[None, :]
    scores_CC = tl.zeros((C, C), tl.float32)
    for at in range(0, K, KEYS):
        kk = at + tl.arange(0, KEYS)
        q_CK = _tokens(q, b, c, hk, kk, T, HK, K, C).to(tl.float32)
        k_CK = _tokens(k, b, c, hk, kk, T, HK, K, C).to(tl.float32)
        coarse_CK, fine_CK = _tokens(coarse, b, c, h, kk, T, H, K, C), _tokens(fine, b, c, h, kk, T, H, K, C)
        scores_CC += tl.where(own, tl.sum(q_CK * k_CK, axis=1)[:, None], 0.0)
        for level in range(0, LEVELS):
            half = 1 << level
            _, x_CK, decay = _level(q_CK, k_CK, coarse_CK, fine_CK, coarse, fine, half, b, c, h, kk, T, H, K, C)
            x_CK = (x_CK * decay).to(q.dtype.element_ty)
            scores_CC += tl.where(_meet(half, C), _dot(x_CK, tl.trans(x_CK)), 0.0)
        into, out, kept_K = _borders(coarse_CK, fine_CK, coarse, fine, first, first_end, b, c, h, kk, T, J, H, K, C, HAS_DOCS)
        _store_tokens(q_into, q_CK * into, b, c, h, kk, T, H, K, C)
        _store_tokens(k_out, k_CK * out, b, c, h, kk, T, H, K, C)
        tl.store(kept + ((b * J + c) * H + h) * K + kk, kept_K, mask=kk < K)
    scores_CC = tl.where(_lower(first, b, c, T, C, HAS_DOCS), scores_CC, 0.0)
    _store_square(scores, scores_CC, b * H + h, c, T, C)


@triton.jit
def _square(x, head, c, T, C: tl.constexpr):
    """(C, C) of x (B, H, T, C)."""
    place = tl.arange(0, C)
    return tl.load(x + (head * T + c * C + place)[:, None] * C + place[None, :])


@triton.jit
def _store_square(x, value, head, c, T, C: tl.constexpr):
    place = tl.arange(0, C)
    tl.store(x + (head * T + c * C + place)[:, None] * C + place[None, :], value.to(x.dtype.element_ty))


@triton.jit
def _written(v, u, b, c, h, vv, T, H: tl.constexpr, V: tl.constexpr, C: tl.constexpr, HAS_U: tl.constexpr):
    """(C, len(vv)): values times their write strengths."""
    v_CV = _tokens(v, b, c, h, vv, T, H, V, C)
    return _scaled(v_CV, _writes(u, b * H + h, c, T, C, HAS_U)) if HAS_U else v_CV


@triton.jit
def _kept(kept, b, c, h, kk, J, H: tl.constexpr, K: tl.constexpr):
    return tl.load(kept + ((b * J + c) * H + h) * K + kk, mask=kk < K, other=0.0)[:, None]


@triton.jit
def forward(
    scores,
    q_into,
    k_out,
    kept,
    v,
    u,
    initial,
    T,
    J,
    o,
    final,
    states,
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
):
    """o, the final state, and with STRIDE > 0 the states entering every STRIDE-th chunk. Programs own a slab of V."""
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
                _store_state(states, state, _group(b, c, h, J, H, STRIDE), kk, vv, K, V)
        q_CK = _tokens(q_into, b, c, h, kk, T, H, K, C)
        write_CV = _written(v, u, b, c, h, vv, T, H, V, C, HAS_U)
        o_CV = _dot(_square(scores, head, c, T, C), write_CV) + _dot(q_CK, state.to(q_CK.dtype))
        _store_tokens(o, SCALE * o_CV, b, c, h, vv, T, H, V, C)
        k_CK = _tokens(k_out, b, c, h, kk, T, H, K, C)
        state = _kept(kept, b, c, h, kk, J, H, K) * state + _dot(tl.trans(k_CK), write_CV)
    _store_state(final, state, head, kk, vv, K, V)


@triton.jit
def queries(
    q_into,
    k_out,
    kept,
    v,
    u,
    do,
    initial,
    T,
    J,
    dq_into,
    reads,
    anchors,
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
):
    """The gradient of q_into; what decays feel of all reads of a chunk (B, J, H, K); the state that enters the last of every
    STRIDE chunks. Programs own a slab of K."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    kk = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    vv = tl.arange(0, VALUES)
    state = tl.zeros((KEYS, VALUES), tl.float32)
    if HAS_INITIAL:
        state = _state(initial, b * H + h, kk, vv, K, V)
    for c in range(0, J):
        if _ends_group(c, J, STRIDE):
            _store_state(anchors, state, _group(b, c, h, J, H, STRIDE), kk, vv, K, V)
        do_CV = _tokens(do, b, c, h, vv, T, H, V, C)
        dq_CK = SCALE * _dot(do_CV, tl.trans(state.to(do_CV.dtype)))
        _store_tokens(dq_into, dq_CK, b, c, h, kk, T, H, K, C)
        q_CK = _tokens(q_into, b, c, h, kk, T, H, K, C)
        tl.store(reads + ((b * J + c) * H + h) * K + kk, tl.sum(q_CK.to(tl.float32) * dq_CK, axis=0), mask=kk < K)
        k_CK = _tokens(k_out, b, c, h, kk, T, H, K, C)
        write_CV = _written(v, u, b, c, h, vv, T, H, V, C, HAS_U)
        state = _kept(kept, b, c, h, kk, J, H, K) * state + _dot(tl.trans(k_CK), write_CV)


@triton.jit
def keys(
    q_into,
    k_out,
    kept,
    v,
    u,
    do,
    anchors,
    d_final,
    d_states,
    T,
    J,
    dk_out,
    writes,
    met,
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
):
    """The gradient of k_out; what decays feel of all writes of a chunk (B, J, H, K); and (B, N, H, K) the states of `queries`
    times the cotangents of the states that leave those chunks. Programs own a slab of K and walk backwards."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    kk = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    vv = tl.arange(0, VALUES)
    d_state = _state(d_final, b * H + h, kk, vv, K, V)
    for step in range(0, J):
        c = J - 1 - step
        if _ends_group(c, J, STRIDE):
            group = _group(b, c, h, J, H, STRIDE)
            met_K = tl.sum(_state(anchors, group, kk, vv, K, V) * d_state, axis=1)
            tl.store(met + group * K + kk, met_K, mask=kk < K)
        write_CV = _written(v, u, b, c, h, vv, T, H, V, C, HAS_U)
        dk_CK = _dot(write_CV, tl.trans(d_state.to(write_CV.dtype)))
        _store_tokens(dk_out, dk_CK, b, c, h, kk, T, H, K, C)
        k_CK = _tokens(k_out, b, c, h, kk, T, H, K, C)
        tl.store(writes + ((b * J + c) * H + h) * K + kk, tl.sum(k_CK.to(tl.float32) * dk_CK, axis=0), mask=kk < K)
        q_CK = _tokens(q_into, b, c, h, kk, T, H, K, C)
        do_CV = _tokens(do, b, c, h, vv, T, H, V, C)
        d_state = _kept(kept, b, c, h, kk, J, H, K) * d_state + SCALE * _dot(tl.trans(q_CK), do_CV)
        if HAS_STATES:
            d_state = _with_cotangent(d_state, d_states, b, c, h, kk, vv, J, H, K, V, STRIDE)


@triton.jit
def values(
    scores,
    q_into,
    k_out,
    kept,
    v,
    u,
    do,
    d_final,
    d_states,
    T,
    J,
    dv,
    du,
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
    GATED: tl.constexpr,
):
    """dv (B, T, H, V); if GATED what write strengths feel (X, B, H, T); the cotangent of the initial state. Programs own a slab
    of V and walk backwards."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = b * H + h
    kk = tl.arange(0, KEYS)
    vv = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    part = tl.program_id(0) * tl.num_programs(2) * H + head
    d_state = _state(d_final, head, kk, vv, K, V)
    for step in range(0, J):
        c = J - 1 - step
        do_CV = _tokens(do, b, c, h, vv, T, H, V, C)
        k_CK = _tokens(k_out, b, c, h, kk, T, H, K, C)
        d_write = SCALE * _dot(tl.trans(_square(scores, head, c, T, C)), do_CV) + _dot(k_CK, d_state.to(k_CK.dtype))
        _store_tokens(dv, _writes(u, head, c, T, C, HAS_U)[:, None] * d_write, b, c, h, vv, T, H, V, C)
        if GATED:
            v_CV = _tokens(v, b, c, h, vv, T, H, V, C).to(tl.float32)
            tl.store(du + part * T + c * C + tl.arange(0, C), tl.sum(v_CV * d_write, axis=1))
        q_CK = _tokens(q_into, b, c, h, kk, T, H, K, C)
        d_state = _kept(kept, b, c, h, kk, J, H, K) * d_state + SCALE * _dot(tl.trans(q_CK), do_CV)
        if HAS_STATES:
            d_state = _with_cotangent(d_state, d_states, b, c, h, kk, vv, J, H, K, V, STRIDE)
    _store_state(d_initial, d_state, head, kk, vv, K, V)


@triton.jit
def inner(
    q,
    k,
    v,
    coarse,
    fine,
    u,
    first,
    first_end,
    do,
    dq_into,
    dk_out,
    through,
    T,
    J,
    dq,
    dk,
    dg,
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
):
    """dq, dk and dg (B, T, H, K), from the pairs inside the chunk, the gradients of q_into and k_out, and through (B, J, H, K):
    what decays feel of the state that passes the whole chunk. Programs own a slab of K of one chunk.

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

    d_scores = _dot(_tokens(do, b, c, h, vv, T, H, V, C), tl.trans(_tokens(v, b, c, h, vv, T, H, V, C)))
    d_scores = SCALE * d_scores * _writes(u, b * H + h, c, T, C, HAS_U)[None, :]
    d_scores = tl.where(_lower(first, b, c, T, C, HAS_DOCS), d_scores, 0.0)
    own = tl.sum(tl.where(t == other, d_scores, 0.0), axis=1)[:, None]
    both = tl.where(t > other, d_scores, 0.0)
    both = both + tl.trans(both)  # a key's row has what its queries' have in its column

    q_CK = _tokens(q, b, c, hk, kk, T, HK, K, C)
    k_CK = _tokens(k, b, c, hk, kk, T, HK, K, C)
    coarse_CK, fine_CK = _tokens(coarse, b, c, h, kk, T, H, K, C), _tokens(fine, b, c, h, kk, T, H, K, C)
    into, out, _ = _borders(coarse_CK, fine_CK, coarse, fine, first, first_end, b, c, h, kk, T, J, H, K, C, HAS_DOCS)
    into *= _tokens(dq_into, b, c, h, kk, T, H, K, C).to(tl.float32)
    out *= _tokens(dk_out, b, c, h, kk, T, H, K, C).to(tl.float32)
    dg_CK = _between(t <= other, q_CK * into, exact) + _between(t > other, k_CK * out, exact)
    dg_CK += tl.load(through + ((b * J + c) * H + h) * K + kk, mask=kk < K, other=0.0)[None, :]
    dq_CK = own * k_CK + into
    dk_CK = own * q_CK + out
    for level in range(0, LEVELS):
        half = 1 << level
        right, x_CK, decay = _level(q_CK, k_CK, coarse_CK, fine_CK, coarse, fine, half, b, c, h, kk, T, H, K, C)
        x_CK = x_CK.to(tl.float32)
        weights = tl.where(_meet(half, C), both, 0.0).to(low)
        dx_CK = decay * _dot(weights, (x_CK * decay).to(low))
        dq_CK += tl.where(right, dx_CK, 0.0)
        dk_CK += tl.where(right, 0.0, dx_CK)
        # Of the same half: tokens up to a query, and those after a key.
        ahead = ((t ^ other) < half) & (((other & half) != 0) == (t <= other))
        dg_CK += _between(ahead, x_CK * dx_CK, exact)
    _store_tokens(dq, dq_CK, b, c, h, kk, T, H, K, C)
    _store_tokens(dk, dk_CK, b, c, h, kk, T, H, K, C)
    _store_tokens(dg, dg_CK, b, c, h, kk, T, H, K, C)
