"""What Triton kernels share that decay each key dim by itself.

Inside a chunk of C tokens, i and j meet at one of log2(C) levels: in the smallest block of 2 `half` tokens that holds both, i in
its right half and j in its left. From j to the block's middle and from there to i, both exponents are at most 0. So at every
level one tile, with the queries of right halves and the keys of left halves decayed to their middle, times its own transpose has
that level's scores in it; and the gradient of the tile is one product with the scores' gradients.

coarse and fine (B, T, H, K): sums of log decays, see `_triton_vector_kernels.sums`; b row, c chunk, h value head, kk key dims.
"""

import triton
import triton.language as tl

from mlt_kernels.linear_recurrence._triton_kernels import INTERPRETED, _dot


@triton.jit
def _level(q_CK, k_CK, coarse_CK, fine_CK, coarse, fine, half, b, c, h, kk, T, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr):
    """Of the blocks of 2 half tokens: whether a token is in the right half; there its query, else its key; and its decay from
    or to the middle. Where a document border lies between, the decay is any number from 0 to 1: such pairs are masked."""
    place = tl.arange(0, C)
    right = ((place & half) != 0)[:, None]
    middle = (place | (2 * half - 1)) - half  # the left half's last token
    at, mask = middle[:, None] * (H * K) + kk[None, :], (kk < K)[None, :]
    start = ((b * T + c * C) * H + h) * K
    since = coarse_CK - tl.load(coarse + start + at, mask=mask, other=0.0)
    since += fine_CK - tl.load(fine + start + at, mask=mask, other=0.0)
    return right, tl.where(right, q_CK, k_CK), tl.exp(tl.minimum(tl.where(right, since, -since), 0.0))


@triton.jit
def _meet(half, C: tl.constexpr):
    """(C, C): pairs of tokens that meet at this level."""
    place = tl.arange(0, C)
    apart = place[:, None] ^ place[None, :]
    return (apart >= half) & (apart < 2 * half)


@triton.jit
def _between(mask, felt, EXACT: tl.constexpr):
    """(C, len(kk)): for each row of the mask, the sum of the rows of felt that it names. Unless EXACT its terms are rounded to
    TF32 (11 bits), still finer than the 16-bit operands that they were made of."""
    mask = tl.where(mask, 1.0, 0.0)
    if INTERPRETED or EXACT:
        return _dot(mask, felt)
    return tl.dot(mask, felt, input_precision="tf32")


@triton.jit
def _lower(first, b, c, T, C: tl.constexpr, HAS_DOCS: tl.constexpr):
    """(C, C): pairs of a query and a key not after it of one document."""
    place = tl.arange(0, C)
    lower = place[:, None] >= place[None, :]
    if HAS_DOCS:
        lower = lower & (tl.load(first + b * T + c * C + place)[:, None] <= place[None, :])
    return lower


@triton.jit
def _borders(
    coarse_CK,
    fine_CK,
    coarse,
    fine,
    first,
    first_end,
    b,
    c,
    h,
    kk,
    T,
    J,
    H: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    HAS_DOCS: tl.constexpr,
):
    """Decays from the chunk's start to i, from j to its end, and of the state that entered; 0 across a document border."""
    end = ((b * T + c * C + C - 1) * H + h) * K + kk
    coarse_K, fine_K = tl.load(coarse + end, mask=kk < K, other=0.0), tl.load(fine + end, mask=kk < K, other=0.0)
    into, out = coarse_CK + fine_CK, (coarse_K[None, :] - coarse_CK) + (fine_K[None, :] - fine_CK)
    kept = coarse_K + fine_K
    if HAS_DOCS:
        place = tl.arange(0, C)
        begin_end = tl.load(first_end + b * J + c)
        into = tl.where((tl.load(first + b * T + c * C + place) < 0)[:, None], into, float("-inf"))
        out = tl.where((place >= begin_end)[:, None], out, float("-inf"))
        kept = tl.where(begin_end < 0, kept, float("-inf"))
    return tl.exp(into), tl.exp(out), tl.exp(kept)
