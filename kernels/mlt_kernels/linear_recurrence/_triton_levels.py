"""What Triton kernels share that decay each key dim by itself.

Inside a chunk of C tokens, i and j meet at one of log2(C) levels: in the smallest block of 2 `half` tokens that holds both, i in
its right half and j in its left. From j to the block's middle and from there to i, both exponents are at most 0. So at every
level one tile, with the queries of right halves and the keys of left halves decayed to their middle, times its own transpose has
that level's scores in it; and the gradient of the tile is one product with the scores' gradients.

coarse, fine (B, T, H, K) float32: see `sums`; first (B, T) and first_end (B, J) int32: see `_kernel_inputs.Documents`. Other
names of arguments as in `_triton_tiles`.
"""

import triton
import triton.language as tl

from mlt_kernels.linear_recurrence._triton_tiles import INTERPRETED, dot, load_tokens, store_tokens


@triton.jit
def sums(
    g, place,
    T,
    coarse, fine,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, KEYS: tl.constexpr, GRID: tl.constexpr, HAS_DOCS: tl.constexpr,
):  # fmt: skip
    """A kernel: log decays g (B, T, H, K) summed since the chunk or the document began, as coarse parts, multiples of 1 / GRID
    whose sums and differences are exact, and the rest. place (B, T): first with padding told as what precedes it. Programs are
    (chunk and slab of K, value head, row)."""
    slabs: tl.constexpr = (K + KEYS - 1) // KEYS
    c, h, b = tl.program_id(0) // slabs, tl.program_id(1), tl.program_id(2).to(tl.int64)
    kk = tl.program_id(0) % slabs * KEYS + tl.arange(0, KEYS)
    within = tl.where(visible(place, b, c, T, C, HAS_DOCS), 1.0, 0.0)
    g_CK = load_tokens(g, b, c, h, kk, T, H, K, C)
    coarse_CK = tl.floor(g_CK * GRID + 0.5) / GRID
    store_tokens(coarse, dot(within, coarse_CK), b, c, h, kk, T, H, K, C)
    store_tokens(fine, dot(within, g_CK - coarse_CK), b, c, h, kk, T, H, K, C)


@triton.jit
def halves(q_CK, k_CK, coarse_CK, fine_CK, coarse, fine, half, b, c, h, kk, T, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr):
    """Of the blocks of 2 half tokens: whether a token is in the right half (C, 1); there its query, else its key (C, len(kk));
    and its decay from or to the middle (C, len(kk)). Where a document border lies between, the decay is any number from 0 to 1:
    such pairs are masked."""
    place = tl.arange(0, C)
    right = ((place & half) != 0)[:, None]
    middle = (place | (2 * half - 1)) - half  # the left half's last token
    at, mask = middle[:, None] * (H * K) + kk[None, :], (kk < K)[None, :]
    start = ((b * T + c * C) * H + h) * K
    since = coarse_CK - tl.load(coarse + start + at, mask=mask, other=0.0)
    since += fine_CK - tl.load(fine + start + at, mask=mask, other=0.0)
    return right, tl.where(right, q_CK, k_CK), tl.exp(tl.minimum(tl.where(right, since, -since), 0.0))


@triton.jit
def meets(half, C: tl.constexpr):
    """(C, C): pairs of tokens that meet at this level."""
    place = tl.arange(0, C)
    apart = place[:, None] ^ place[None, :]
    return (apart >= half) & (apart < 2 * half)


@triton.jit
def ahead(half, C: tl.constexpr):
    """(t, i), (C, C): tokens of the same half, t up to a query i or t after a key i: between i and the middle."""
    t, i = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return ((t ^ i) < half) & (((i & half) != 0) == (t <= i))


@triton.jit
def sum_rows(mask, felt, EXACT: tl.constexpr):
    """(C, len(kk)): for each row of the mask (C, C), the sum of the rows of felt (C, len(kk)) that it names. Unless EXACT its
    terms are rounded to TF32 (11 bits), still finer than the 16-bit operands that they were made of."""
    mask = tl.where(mask, 1.0, 0.0)
    if INTERPRETED or EXACT:
        return dot(mask, felt)
    return tl.dot(mask, felt, input_precision="tf32")


@triton.jit
def visible(first, b, c, T, C: tl.constexpr, HAS_DOCS: tl.constexpr):
    """(C, C): pairs of a query and a key not after it of one document."""
    place = tl.arange(0, C)
    pairs = place[:, None] >= place[None, :]
    if HAS_DOCS:
        pairs = pairs & (tl.load(first + b * T + c * C + place)[:, None] <= place[None, :])
    return pairs


@triton.jit
def borders(
    coarse_CK, fine_CK, coarse, fine, first, first_end, b, c, h, kk, T, J,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, HAS_DOCS: tl.constexpr,
):  # fmt: skip
    """Decays from the chunk's start to i and from j to its end (C, len(kk)), and of the state that entered (len(kk),); 0 across a
    document border."""
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
