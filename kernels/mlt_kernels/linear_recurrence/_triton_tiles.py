"""Tiles of arrays, as the Triton kernels of this op read and write them, and their products.

Names of arguments: b row, c chunk of C tokens, h head, d dims of a tile, kk and vv those of K and V, n which of many matrices. A
tile is as wide as kk or vv is long; what lies beyond the array's dim reads as 0 and is not written. b is an int64, and so is
every offset of an array that is longer than a tile: B T H K may pass 2**31.
"""

import triton
import triton.language as tl

from mlt_kernels import triton_calls

INTERPRETED: tl.constexpr = tl.constexpr(triton_calls.started_for_interpreter())


@triton.jit
def dot(a, b):
    """Product accumulated in float32; float32 tiles are multiplied as three TF32 products (22 bits)."""
    if INTERPRETED:  # Its product reads bfloat16 as integers.
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    if a.dtype == tl.float32:
        return tl.dot(a, b, input_precision="tf32x3")
    return tl.dot(a, b)


@triton.jit
def scaled(x, by):
    """Rows of x (C, D) times a factor each (C,), in the dtype of x."""
    return (x.to(tl.float32) * by[:, None]).to(x.dtype)


@triton.jit
def strictly_lower(x, C: tl.constexpr, TRANSPOSED: tl.constexpr = False):
    """The part of x (i, j) below the diagonal; TRANSPOSED: of x (j, i)."""
    place = tl.arange(0, C)
    before = place[:, None] < place[None, :] if TRANSPOSED else place[None, :] < place[:, None]
    return tl.where(before, x, 0.0)


@triton.jit
def load_tokens(x, b, c, h, d, T, heads: tl.constexpr, D: tl.constexpr, C: tl.constexpr):
    """(C, len(d)) of x (B, T, heads, D)."""
    at = tl.arange(0, C)[:, None] * (heads * D) + d[None, :]
    return tl.load(x + ((b * T + c * C) * heads + h) * D + at, mask=(d < D)[None, :], other=0.0)


@triton.jit
def store_tokens(x, value, b, c, h, d, T, heads: tl.constexpr, D: tl.constexpr, C: tl.constexpr):
    """Writes value (C, len(d)) to x (B, T, heads, D), in the dtype of x."""
    at = tl.arange(0, C)[:, None] * (heads * D) + d[None, :]
    tl.store(x + ((b * T + c * C) * heads + h) * D + at, value.to(x.dtype.element_ty), mask=(d < D)[None, :])


@triton.jit
def load_state(x, n, kk, vv, K: tl.constexpr, V: tl.constexpr):
    """(len(kk), len(vv)) of the n-th state of x (..., K, V)."""
    mask = (kk < K)[:, None] & (vv < V)[None, :]
    return tl.load(x + n * (K * V) + kk[:, None] * V + vv[None, :], mask=mask, other=0.0)


@triton.jit
def store_state(x, value, n, kk, vv, K: tl.constexpr, V: tl.constexpr):
    """Writes value (len(kk), len(vv)) to the n-th state of x (..., K, V), in the dtype of x."""
    mask = (kk < K)[:, None] & (vv < V)[None, :]
    tl.store(x + n * (K * V) + kk[:, None] * V + vv[None, :], value, mask=mask)


@triton.jit
def load_square(x, n, C: tl.constexpr):
    """The n-th of x (..., C, C)."""
    place = tl.arange(0, C)
    return tl.load(x + n * (C * C) + place[:, None] * C + place[None, :])


@triton.jit
def store_square(x, value, n, C: tl.constexpr):
    """Writes value (C, C) to the n-th of x (..., C, C), in the dtype of x."""
    place = tl.arange(0, C)
    tl.store(x + n * (C * C) + place[:, None] * C + place[None, :], value.to(x.dtype.element_ty))


@triton.jit
def load_keys(x, b, c, h, kk, J, H: tl.constexpr, K: tl.constexpr):
    """(len(kk),) of x (B, J, H, K): one number a key dim and chunk."""
    return tl.load(x + ((b * J + c) * H + h) * K + kk, mask=kk < K, other=0.0)


@triton.jit
def store_keys(x, value, b, c, h, kk, J, H: tl.constexpr, K: tl.constexpr):
    """Writes value (len(kk),) to x (B, J, H, K)."""
    tl.store(x + ((b * J + c) * H + h) * K + kk, value, mask=kk < K)


@triton.jit
def store_felt(x, value, slab, head, c, T, H: tl.constexpr, C: tl.constexpr):
    """Writes value (C,) to x (X, B, H, T): the part that this slab adds to what each token's gate feels. head is b H + h."""
    part = slab * tl.num_programs(2) * H + head
    tl.store(x + part * T + c * C + tl.arange(0, C), value)
