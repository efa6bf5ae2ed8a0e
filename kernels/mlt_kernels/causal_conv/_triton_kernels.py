"""Triton kernels of `causal_conv`: a program owns a tile of tokens and channels; the taps are loads of shifted tiles.

x (B, T, D), kernel (W, D) float32, first (B, T) int32: the place of the first token of a token's document, -CONTEXT if it
came in with the halo (B, CONTEXT, D). CONTEXT = (W - 1) DILATION.
"""

import triton
import triton.language as tl


@triton.jit
def _inputs(x, halo, place, source, d, own, D: tl.constexpr, HAS_HALO: tl.constexpr):
    """(TOKENS, CHANNELS) float32 inputs at the tokens `source`, zero where not `own`; x and halo point to the tile, `place`
    counts from there."""
    real = own & (d < D)[None, :]
    at = place[:, None] * D + d[None, :]
    value = tl.load(x + at, mask=real & (source >= 0)[:, None], other=0.0).to(tl.float32)
    if HAS_HALO:
        value += tl.load(halo + at, mask=real & (source < 0)[:, None], other=0.0).to(tl.float32)
    return value


@triton.jit
def _starts(first, b, t, T, CONTEXT: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_HALO: tl.constexpr):
    """Place of the first token that each token reads; behind every token for tokens that are not there."""
    there = (t >= 0) & (t < T)
    if HAS_SEGMENTS:
        return tl.load(first + b * T + t, mask=there, other=2147483647)
    return tl.where(there, -CONTEXT if HAS_HALO else 0, 2147483647)


@triton.jit
def _argument(
    x, kernel, bias, halo, i, t, d, start,
    D: tl.constexpr, W: tl.constexpr, DILATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_HALO: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """(TOKENS, CHANNELS): the activation's argument."""
    out = tl.zeros((TOKENS, CHANNELS), tl.float32)
    if HAS_BIAS:
        out += tl.load(bias + d, mask=d < D, other=0.0)[None, :]
    for back in tl.static_range(0, W):
        tap = tl.load(kernel + (W - 1 - back) * D + d, mask=d < D, other=0.0)
        source = t - back * DILATION
        own = (source >= start)[:, None]
        out += tap[None, :] * _inputs(x, halo, i - back * DILATION, source, d, own, D, HAS_HALO)
    return out


@triton.jit
def forward(
    x, kernel, bias, first, halo,
    T,
    y,
    D: tl.constexpr, W: tl.constexpr, DILATION: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_HALO: tl.constexpr,
):  # fmt: skip
    """y (B, T, D). Programs are (tile of tokens, block of channels, row)."""
    b = tl.program_id(2).to(tl.int64)
    i = tl.arange(0, TOKENS)
    t0 = tl.program_id(0) * TOKENS
    t = t0 + i
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    x += (b * T + t0) * D
    y += (b * T + t0) * D
    halo += ((b + 1) * (W - 1) * DILATION + t0) * D
    start = _starts(first, b, t, T, (W - 1) * DILATION, HAS_SEGMENTS, HAS_HALO)
    out = _argument(x, kernel, bias, halo, i, t, d, start, D, W, DILATION, HAS_BIAS, HAS_HALO, TOKENS, CHANNELS)
    if SILU:
        out = out * tl.sigmoid(out)
    there = (t < T)[:, None] & (d < D)[None, :]
    tl.store(y + i[:, None] * D + d[None, :], out.to(y.dtype.element_ty), mask=there)


@triton.jit
def backward(
    x, dy, kernel, bias, first, halo,
    T,
    dx, dhalo, dkernel, dbias,
    D: tl.constexpr, W: tl.constexpr, DILATION: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
    TAPS: tl.constexpr, TILES: tl.constexpr,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_HALO: tl.constexpr,
):  # fmt: skip
    """dx of TILES times TOKENS - CONTEXT inputs, halo included, and their part of dkernel (B, P, W, D) and dbias (B, P, D).

    The last CONTEXT tokens of a tile are there for what they give to the inputs in front of them; the next tile counts them.
    """
    CONTEXT: tl.constexpr = (W - 1) * DILATION
    STEP: tl.constexpr = TOKENS - CONTEXT
    p, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    i = tl.arange(0, TOKENS)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    which = tl.arange(0, TAPS)[:, None]
    dtaps = tl.zeros((TAPS, CHANNELS), tl.float32)
    dbiases = tl.zeros((CHANNELS,), tl.float32)
    for tile in range(0, TILES):
        t0 = (p * TILES + tile) * STEP
        if HAS_HALO:
            t0 -= CONTEXT
        t = t0 + i
        at_x, at_halo = (b * T + t0) * D, ((b + 1) * CONTEXT + t0) * D
        start = _starts(first, b, t, T, CONTEXT, HAS_SEGMENTS, HAS_HALO)
        there = ((t >= 0) & (t < T))[:, None] & (d < D)[None, :]
        at = i[:, None] * D + d[None, :]
        dout = tl.load(dy + at_x + at, mask=there, other=0.0).to(tl.float32)
        if SILU:
            out = _argument(
                x + at_x, kernel, bias, halo + at_halo, i, t, d, start, D, W, DILATION, HAS_BIAS, HAS_HALO, TOKENS, CHANNELS
            )
            gate = tl.sigmoid(out)
            dout *= gate * (1.0 + out * (1.0 - gate))
        counted = tl.where((i < STEP)[:, None], dout, 0.0)
        dbiases += tl.sum(counted, axis=0)
        din = tl.zeros((TOKENS, CHANNELS), tl.float32)
        for back in tl.static_range(0, W):
            source = t - back * DILATION
            own = (source >= start)[:, None]
            tap = tl.load(kernel + (W - 1 - back) * D + d, mask=d < D, other=0.0)
            given = tl.where(own, tap[None, :] * dout, 0.0)
            if back > 0:
                behind = tl.minimum(i + back * DILATION, TOKENS - 1)
                given = tl.gather(given, tl.broadcast_to(behind[:, None], (TOKENS, CHANNELS)), 0)
            din += given
            read = _inputs(x + at_x, halo + at_halo, i - back * DILATION, source, d, own, D, HAS_HALO)
            dtaps += tl.where(which == W - 1 - back, tl.sum(counted * read, axis=0)[None, :], 0.0)
        given_to = (i < STEP)[:, None] & (d < D)[None, :]
        tl.store(dx + at_x + at, din.to(dx.dtype.element_ty), mask=given_to & there)
        if HAS_HALO:
            tl.store(dhalo + at_halo + at, din.to(dhalo.dtype.element_ty), mask=given_to & (t < 0)[:, None])
    part = b * tl.num_programs(0) + p
    tl.store(dkernel + (part * W + which) * D + d[None, :], dtaps, mask=(which < W) & (d < D)[None, :])
    tl.store(dbias + part * D + d, dbiases, mask=d < D)
