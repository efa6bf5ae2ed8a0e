"""Triton kernels of `diagonal_recurrence`: a program walks along a piece of a row in tiles, each an associative scan.

Rows (B, T, E); states that enter and leave pieces (B, P, E) float32; marks (B, T) of `_march`. A complex array is two real
ones; for real numbers the imaginary ones are neither read nor written. The walk's step i is token i, or T - 1 - i if
REVERSE. In the BACKWARD walk, which goes the other way, a step's factor is the conjugate of that of the step before.
"""

import triton
import triton.language as tl

from mlt_kernels.diagonal_recurrence import _march

START: tl.constexpr = tl.constexpr(_march.START)
PADDING: tl.constexpr = tl.constexpr(_march.PADDING)


@triton.jit
def _compose(a1, b1, a2, b2):
    """h -> a1 h + b1, then h -> a2 h + b2, as one such map."""
    return a2 * a1, a2 * b1 + b2


@triton.jit
def _compose_complex(a1, a1_im, b1, b1_im, a2, a2_im, b2, b2_im):
    """The same of complex numbers."""
    return (
        a2 * a1 - a2_im * a1_im,
        a2 * a1_im + a2_im * a1,
        a2 * b1 - a2_im * b1_im + b2,
        a2 * b1_im + a2_im * b1 + b2_im,
    )


@triton.jit
def _kinds(mark, b, i, T, REVERSE: tl.constexpr, HAS_MARKS: tl.constexpr):
    """Marks of the steps i; steps that are not there leave the state as it is."""
    there = (i >= 0) & (i < T)
    if HAS_MARKS:
        return tl.load(mark + b * T + (T - 1 - i if REVERSE else i), mask=there, other=PADDING)
    return tl.where(there, 0, PADDING)


@triton.jit
def _rows(x, b, i0, place, e, T, E: tl.constexpr, REVERSE: tl.constexpr):
    """(len(place), len(e)) float32 of x (B, T, E) at the steps i0 + place, zero where there are none."""
    first = (b * T + (T - 1 - i0 if REVERSE else i0)) * E
    there = (i0 + place >= 0) & (i0 + place < T)
    at = (-place if REVERSE else place)[:, None] * E + e[None, :]
    return tl.load(x + first + at, mask=there[:, None] & (e < E)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store_rows(x, value, b, i0, place, e, T, E: tl.constexpr, REVERSE: tl.constexpr):
    """Writes value (len(place), len(e)) to x (B, T, E) at the steps i0 + place that there are."""
    first = (b * T + (T - 1 - i0 if REVERSE else i0)) * E
    at = (-place if REVERSE else place)[:, None] * E + e[None, :]
    tl.store(x + first + at, value.to(x.dtype.element_ty), mask=(i0 + place < T)[:, None] & (e < E)[None, :])


@triton.jit
def _scan(
    a, a_im, b, b_im, mark, row, i0, place, e, T,
    E: tl.constexpr, REVERSE: tl.constexpr, COMPLEX: tl.constexpr, HAS_MARKS: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """(factor, its imaginary part, sum, its imaginary part): h of a step is factor * (h entering the tile) + sum."""
    kind = _kinds(mark, row, i0 + place, T, REVERSE, HAS_MARKS)[:, None]
    factor = _rows(a, row, i0, place - 1 if BACKWARD else place, e, T, E, REVERSE)
    write = tl.where(kind == PADDING, 0.0, _rows(b, row, i0, place, e, T, E, REVERSE))
    if BACKWARD:
        write = _rows(b, row, i0, place, e, T, E, REVERSE)
        kind = tl.where(i0 + place < T, _kinds(mark, row, i0 + place - 1, T, REVERSE, HAS_MARKS), PADDING)[:, None]
    factor = tl.where(kind == START, 0.0, tl.where(kind == PADDING, 1.0, factor))
    if COMPLEX:
        factor_im = _rows(a_im, row, i0, place - 1 if BACKWARD else place, e, T, E, REVERSE)
        factor_im = tl.where((kind == START) | (kind == PADDING), 0.0, -factor_im if BACKWARD else factor_im)
        write_im = _rows(b_im, row, i0, place, e, T, E, REVERSE)
        if not BACKWARD:
            write_im = tl.where(kind == PADDING, 0.0, write_im)
        factor, factor_im, write, write_im = tl.associative_scan((factor, factor_im, write, write_im), 0, _compose_complex)
    else:
        factor, write = tl.associative_scan((factor, write), 0, _compose)
        factor_im, write_im = factor, write
    return factor, factor_im, write, write_im


@triton.jit
def _last(x, place, TOKENS: tl.constexpr):
    """(len(e),): the last row of a tile. All other terms of the sum are zero, so it is exact."""
    return tl.sum(tl.where((place == TOKENS - 1)[:, None], x, 0.0), axis=0)


@triton.jit
def ends(
    a, a_im, b, b_im, mark,
    T,
    factors, factors_im, leaving, leaving_im,
    E: tl.constexpr, PIECE: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
    REVERSE: tl.constexpr, COMPLEX: tl.constexpr, HAS_MARKS: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """What each piece does to what enters it (B, P, E): a factor, and what leaves if nothing enters. Programs of all kernels are
    (block of channels, piece, row)."""
    p, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    place = tl.arange(0, TOKENS)
    e = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    through = tl.full((CHANNELS,), 1.0, tl.float32)
    through_im = tl.zeros((CHANNELS,), tl.float32)
    end = tl.zeros((CHANNELS,), tl.float32)
    end_im = tl.zeros((CHANNELS,), tl.float32)
    for n in tl.range(0, PIECE, TOKENS, num_stages=STAGES):
        f, f_im, s, s_im = _scan(
            a, a_im, b, b_im, mark, row, p * PIECE + n, place, e, T, E, REVERSE, COMPLEX, HAS_MARKS, BACKWARD
        )
        f, s = _last(f, place, TOKENS), _last(s, place, TOKENS)
        if COMPLEX:
            f_im, s_im = _last(f_im, place, TOKENS), _last(s_im, place, TOKENS)
            end, end_im = f * end - f_im * end_im + s, f * end_im + f_im * end + s_im
            through, through_im = f * through - f_im * through_im, f * through_im + f_im * through
        else:
            end = f * end + s
            through = f * through
    at = (row * tl.num_programs(1) + p) * E + e
    tl.store(factors + at, through, mask=e < E)
    tl.store(leaving + at, end, mask=e < E)
    if COMPLEX:
        tl.store(factors_im + at, through_im, mask=e < E)
        tl.store(leaving_im + at, end_im, mask=e < E)


@triton.jit
def forward(
    a, a_im, b, b_im, mark, entering, entering_im,
    T,
    h, h_im, leaving, leaving_im,
    E: tl.constexpr, PIECE: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
    REVERSE: tl.constexpr, COMPLEX: tl.constexpr, HAS_MARKS: tl.constexpr,
):  # fmt: skip
    """h (B, T, E), and the states that leave the pieces (B, P, E)."""
    p, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    place = tl.arange(0, TOKENS)
    e = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    at = (row * tl.num_programs(1) + p) * E + e
    state = tl.load(entering + at, mask=e < E, other=0.0)
    state_im = tl.load(entering_im + at, mask=e < E, other=0.0) if COMPLEX else state
    for n in tl.range(0, PIECE, TOKENS, num_stages=STAGES):
        i0 = p * PIECE + n
        f, f_im, s, s_im = _scan(a, a_im, b, b_im, mark, row, i0, place, e, T, E, REVERSE, COMPLEX, HAS_MARKS, False)
        if COMPLEX:
            s += f * state[None, :] - f_im * state_im[None, :]
            s_im += f * state_im[None, :] + f_im * state[None, :]
            _store_rows(h_im, s_im, row, i0, place, e, T, E, REVERSE)
            state_im = _last(s_im, place, TOKENS)
        else:
            s += f * state[None, :]
        _store_rows(h, s, row, i0, place, e, T, E, REVERSE)
        state = _last(s, place, TOKENS)
    tl.store(leaving + at, state, mask=e < E)
    if COMPLEX:
        tl.store(leaving_im + at, state_im, mask=e < E)


@triton.jit
def backward(
    a, a_im, h, h_im, dh, dh_im, mark, start, start_im, entering, entering_im,
    T,
    da, da_im, db, db_im, leaving, leaving_im,
    E: tl.constexpr, PIECE: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
    REVERSE: tl.constexpr, COMPLEX: tl.constexpr, HAS_MARKS: tl.constexpr,
):  # fmt: skip
    """With g the cotangent of h after all its uses: db is g, da is g times the conjugate of the h in front, both (B, T, E); and
    the g that leave the pieces (B, P, E). start (B, E) is the state in front of the row."""
    p, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    place = tl.arange(0, TOKENS)
    e = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    at = (row * tl.num_programs(1) + p) * E + e
    g = tl.load(entering + at, mask=e < E, other=0.0)
    g_im = tl.load(entering_im + at, mask=e < E, other=0.0) if COMPLEX else g
    first = tl.load(start + row * E + e, mask=e < E, other=0.0)
    first_im = tl.load(start_im + row * E + e, mask=e < E, other=0.0) if COMPLEX else first
    for n in tl.range(0, PIECE, TOKENS, num_stages=STAGES):
        i0 = p * PIECE + n
        kind = _kinds(mark, row, i0 + place, T, REVERSE, HAS_MARKS)[:, None]
        fresh, padding = (kind == START) | (kind == PADDING), kind == PADDING
        in_front = (i0 + place == T - 1)[:, None]
        f, f_im, s, s_im = _scan(a, a_im, dh, dh_im, mark, row, i0, place, e, T, E, REVERSE, COMPLEX, HAS_MARKS, True)
        before = tl.where(in_front, first[None, :], _rows(h, row, i0, place + 1, e, T, E, REVERSE))
        if COMPLEX:
            s += f * g[None, :] - f_im * g_im[None, :]
            s_im += f * g_im[None, :] + f_im * g[None, :]
            before_im = tl.where(in_front, first_im[None, :], _rows(h_im, row, i0, place + 1, e, T, E, REVERSE))
            da_tile = s * before + s_im * before_im
            da_im_tile = tl.where(fresh, 0.0, s_im * before - s * before_im)
            _store_rows(da_im, da_im_tile, row, i0, place, e, T, E, REVERSE)
            _store_rows(db_im, tl.where(padding, 0.0, s_im), row, i0, place, e, T, E, REVERSE)
            g_im = _last(s_im, place, TOKENS)
        else:
            s += f * g[None, :]
            da_tile = s * before
        _store_rows(da, tl.where(fresh, 0.0, da_tile), row, i0, place, e, T, E, REVERSE)
        _store_rows(db, tl.where(padding, 0.0, s), row, i0, place, e, T, E, REVERSE)
        g = _last(s, place, TOKENS)
    tl.store(leaving + at, g, mask=e < E)
    if COMPLEX:
        tl.store(leaving_im + at, g_im, mask=e < E)
