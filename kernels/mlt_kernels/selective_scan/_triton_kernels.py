"""Triton kernels of `selective_scan`: one warp owns W channels of a row, all their states in registers, and walks along.

Rows (B, T, D); written and read numbers (B, T, N); A (D, N); states (B, D, N); states in front of chunks (B, J, N, D); marks
(B, T) of `_march`. A state tile is (N, W). Nothing is padded: what is not there is masked, tokens past a row's end are padding.
"""

import triton
import triton.language as tl

from mlt_kernels.diagonal_recurrence import _march

START: tl.constexpr = tl.constexpr(_march.START)
PADDING: tl.constexpr = tl.constexpr(_march.PADDING)


@triton.jit
def _kind(mark, row, t, T, HAS_MARKS: tl.constexpr):
    """The mark of a token; a token that is not there is padding."""
    if HAS_MARKS:
        return tl.load(mark + row * T + t, mask=t < T, other=PADDING)
    return tl.where(t < T, 0, PADDING)


@triton.jit
def _row(x, row, t, place, T, SIZE: tl.constexpr):
    """(len(place),) float32 of x (rows, T, SIZE) at a token, zero where there are none."""
    return tl.load(x + (row * T + t) * SIZE + place, mask=(place < SIZE) & (t < T), other=0.0).to(tl.float32)


@triton.jit
def _store_row(x, value, row, t, place, T, SIZE: tl.constexpr):
    """Writes value (len(place),) to x (rows, T, SIZE) at a token that is there."""
    tl.store(x + (row * T + t) * SIZE + place, value.to(x.dtype.element_ty), mask=(place < SIZE) & (t < T))


@triton.jit
def _token(x, step, B, mark, row, t, d, n, T, D: tl.constexpr, N: tl.constexpr, HAS_MARKS: tl.constexpr):
    """(kind, x (W,), step (W,), B (STATES,)) of a token; padding is a step of zero."""
    kind = _kind(mark, row, t, T, HAS_MARKS)
    step_W = tl.where(kind == PADDING, 0.0, _row(step, row, t, d, T, D))
    return kind, _row(x, row, t, d, T, D), step_W, _row(B, row, t, n, T, N)


@triton.jit
def _advance(kind, x_W, step_W, B_N, A_NW, h_NW):
    """(decay, state behind the token), (STATES, W) each; a document starts with a decay of zero."""
    decay_NW = tl.where(kind == START, 0.0, tl.exp(step_W[None, :] * A_NW))
    return decay_NW, decay_NW * h_NW + B_N[:, None] * (step_W * x_W)[None, :]


@triton.jit
def _again(x, step, B, mark, row, t, d, n, T, A_NW, h_NW, D: tl.constexpr, N: tl.constexpr, HAS_MARKS: tl.constexpr):
    """`_advance` of a token that was not loaded before."""
    kind, x_W, step_W, B_N = _token(x, step, B, mark, row, t, d, n, T, D, N, HAS_MARKS)
    return _advance(kind, x_W, step_W, B_N, A_NW, h_NW)


@triton.jit
def forward(
    x, step, B, C, A, skip, start, mark,
    T,
    y, final, borders,
    D: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, W: tl.constexpr, STATES: tl.constexpr,
    HAS_MARKS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """y (B, T, D) and the final state (B, D, N); KEEP: also the state in front of every chunk. Programs are (block of channels,
    row)."""
    row = tl.program_id(1).to(tl.int64)
    d, n = tl.program_id(0) * W + tl.arange(0, W), tl.arange(0, STATES)
    there_NW = (n < N)[:, None] & (d < D)[None, :]
    A_NW = tl.load(A + d[None, :] * N + n[:, None], mask=there_NW, other=0.0)
    skip_W = tl.load(skip + d, mask=d < D, other=0.0)
    h_NW = tl.load(start + (row * D + d)[None, :] * N + n[:, None], mask=there_NW, other=0.0)
    chunks = tl.cdiv(T, CHUNK)
    # Two tokens are loaded while the two in front of them are worked on: a serial loop hides the latency of memory only so.
    kind0, x0, step0, B0 = _token(x, step, B, mark, row, 0, d, n, T, D, N, HAS_MARKS)
    kind1, x1, step1, B1 = _token(x, step, B, mark, row, 1, d, n, T, D, N, HAS_MARKS)
    C0, C1 = _row(C, row, 0, n, T, N), _row(C, row, 1, n, T, N)
    for j in range(0, chunks):
        if KEEP:
            tl.store(borders + ((row * chunks + j) * N + n[:, None]) * D + d[None, :], h_NW, mask=there_NW)
        for i in range(0, CHUNK, 2):
            t = j * CHUNK + i
            kind2, x2, step2, B2 = _token(x, step, B, mark, row, t + 2, d, n, T, D, N, HAS_MARKS)
            kind3, x3, step3, B3 = _token(x, step, B, mark, row, t + 3, d, n, T, D, N, HAS_MARKS)
            C2, C3 = _row(C, row, t + 2, n, T, N), _row(C, row, t + 3, n, T, N)
            _, h_NW = _advance(kind0, x0, step0, B0, A_NW, h_NW)
            y_W = tl.sum(h_NW * C0[:, None], axis=0) + skip_W * x0
            _store_row(y, tl.where(kind0 == PADDING, 0.0, y_W), row, t, d, T, D)
            _, h_NW = _advance(kind1, x1, step1, B1, A_NW, h_NW)
            y_W = tl.sum(h_NW * C1[:, None], axis=0) + skip_W * x1
            _store_row(y, tl.where(kind1 == PADDING, 0.0, y_W), row, t + 1, d, T, D)
            kind0, x0, step0, B0, C0 = kind2, x2, step2, B2, C2
            kind1, x1, step1, B1, C1 = kind3, x3, step3, B3, C3
    tl.store(final + (row * D + d)[None, :] * N + n[:, None], h_NW, mask=there_NW)


@triton.jit
def _back(
    x, step, B, C, dy, mark, dx, dstep, dB, dC, row, part, t, d, n, T, A_NW, skip_W, decay_NW, before_NW, h_NW,
    behind_NW, dA_NW, dskip_W,
    D: tl.constexpr, N: tl.constexpr, HAS_MARKS: tl.constexpr,
):  # fmt: skip
    """One token back: with g_t the cotangent of h_t after all its uses, g_t = C_t dy_t + decay_{t+1} g_{t+1}."""
    kind, x_W, step_W, B_N = _token(x, step, B, mark, row, t, d, n, T, D, N, HAS_MARKS)
    dy_W = tl.where(kind == PADDING, 0.0, _row(dy, row, t, d, T, D))
    g_NW = _row(C, row, t, n, T, N)[:, None] * dy_W[None, :] + behind_NW
    kept_NW = decay_NW * g_NW
    dlog_NW = kept_NW * before_NW
    write_W = tl.sum(g_NW * B_N[:, None], axis=0)
    dstep_W = tl.sum(dlog_NW * A_NW, axis=0) + write_W * x_W
    _store_row(dx, write_W * step_W + skip_W * dy_W, row, t, d, T, D)
    _store_row(dstep, tl.where(kind == PADDING, 0.0, dstep_W), row, t, d, T, D)
    _store_row(dB, tl.sum(g_NW * (step_W * x_W)[None, :], axis=1), part, t, n, T, N)
    _store_row(dC, tl.sum(h_NW * dy_W[None, :], axis=1), part, t, n, T, N)
    return kept_NW, dA_NW + dlog_NW * step_W[None, :], dskip_W + dy_W * x_W


@triton.jit
def backward(
    x, step, B, C, A, skip, behind, mark, borders, dy,
    T,
    dx, dstep, dB, dC, dA, dskip, dstart, scratch,
    D: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, W: tl.constexpr, STATES: tl.constexpr,
    HAS_MARKS: tl.constexpr,
):  # fmt: skip
    """dB, dC (B, blocks, T, N): sums over a block's channels. dA, dskip: of a row. scratch (B, blocks, CHUNK / 2, STATES, W)."""
    row, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    part = row * tl.num_programs(0) + block
    d, n, w = block * W + tl.arange(0, W), tl.arange(0, STATES), tl.arange(0, W)
    there_NW = (n < N)[:, None] & (d < D)[None, :]
    A_NW = tl.load(A + d[None, :] * N + n[:, None], mask=there_NW, other=0.0)
    skip_W = tl.load(skip + d, mask=d < D, other=0.0)
    at_state = (row * D + d)[None, :] * N + n[:, None]
    behind_NW = tl.load(behind + at_state, mask=there_NW, other=0.0)
    dA_NW = tl.zeros((STATES, W), tl.float32)
    dskip_W = tl.zeros((W,), tl.float32)
    chunks = tl.cdiv(T, CHUNK)
    mine = scratch + part * (CHUNK // 2 * STATES * W) + n[:, None] * W + w[None, :]
    for back in range(0, chunks):
        j = chunks - 1 - back
        h_NW = tl.load(borders + ((row * chunks + j) * N + n[:, None]) * D + d[None, :], mask=there_NW, other=0.0)
        # Each thread reads of the scratch array only what it wrote: the layouts are the same. The barriers make it safe anyway.
        for i in range(0, CHUNK, 2):
            tl.store(mine + i // 2 * (STATES * W), h_NW)
            t = j * CHUNK + i
            _, h_NW = _again(x, step, B, mark, row, t, d, n, T, A_NW, h_NW, D, N, HAS_MARKS)
            _, h_NW = _again(x, step, B, mark, row, t + 1, d, n, T, A_NW, h_NW, D, N, HAS_MARKS)
        tl.debug_barrier()
        for i in range(0, CHUNK, 2):
            s = CHUNK - 2 - i
            t = j * CHUNK + s
            h0 = tl.load(mine + s // 2 * (STATES * W))
            decay1, h1 = _again(x, step, B, mark, row, t, d, n, T, A_NW, h0, D, N, HAS_MARKS)
            decay2, h2 = _again(x, step, B, mark, row, t + 1, d, n, T, A_NW, h1, D, N, HAS_MARKS)
            # fmt: off
            behind_NW, dA_NW, dskip_W = _back(
                x, step, B, C, dy, mark, dx, dstep, dB, dC, row, part, t + 1, d, n, T,
                A_NW, skip_W, decay2, h1, h2, behind_NW, dA_NW, dskip_W, D, N, HAS_MARKS)
            behind_NW, dA_NW, dskip_W = _back(
                x, step, B, C, dy, mark, dx, dstep, dB, dC, row, part, t, d, n, T,
                A_NW, skip_W, decay1, h0, h1, behind_NW, dA_NW, dskip_W, D, N, HAS_MARKS)
            # fmt: on
        tl.debug_barrier()
    tl.store(dstart + at_state, behind_NW, mask=there_NW)
    tl.store(dA + at_state, dA_NW, mask=there_NW)
    tl.store(dskip + row * D + d, dskip_W, mask=d < D)
