"""Delta rule in Triton, the solve kernels: for each chunk the inverse of the unit triangular matrix of its writes.

With S_ij = beta_i k_i . k_j for j before i in the same document, the writes of a chunk are (I + S . D)^-1 beta (V - reads), D
the decays from j to i. A scalar decay splits, D_ij = exp(G_i - G_j), and so the inverse of I + S . D is that of I + S times D
element by element: `delta_solve` inverts I + S. A vector decay stands inside the product k_i . k_j: `delta_invert` takes these
products as they were made elsewhere. A program owns one chunk, head and row.

What is stored is the inverse with its decays, (P, B, H, J, C, C) in the dtype of the operands, as P parts that add up to it: one
in float32; three in 16 bits (24 bits for bfloat16), which the walks multiply as they lie in memory, without registers for it.

Blocks of 16 tokens: the diagonal ones are inverted by forward substitution, all at once; the others follow column by column,
T_ad = -T_aa (S_ad T_dd + ... + S_a,a-1 T_a-1,d). All of it is float32. The shorter product of (I + (-S)^(2^i)) is not usable:
it overflows where keys repeat. A lower triangle of blocks is a tuple, row by row: (a, d) at a (a + 1) / 2 + d.
"""

# ruff: noqa: RUF005 (Triton compiles no starred tuples)

import triton
import triton.language as tl

from mlt_kernels.linear_recurrence._triton_delta_tools import nearest
from mlt_kernels.linear_recurrence._triton_tiles import dot, load_tokens

LEAF: tl.constexpr = tl.constexpr(16)


@triton.jit
def leaf_inverses(strict, N: tl.constexpr):
    """(I + S)^-1 of the N diagonal blocks, by forward substitution."""
    place = tl.arange(0, LEAF)
    inverses = ()
    for _ in tl.static_range(N):
        inverses = inverses + (tl.where(place[:, None] == place[None, :], 1.0, 0.0),)
    for j in range(0, LEAF - 1):
        done = ()
        for a in tl.static_range(N):
            column = tl.sum(tl.where(place[None, :] == j, strict[a * (a + 1) // 2 + a], 0.0), axis=1)
            row = tl.sum(tl.where(place[:, None] == j, inverses[a], 0.0), axis=0)
            done = done + (inverses[a] - column[:, None] * row[None, :],)
        inverses = done
    return inverses


@triton.jit
def store_block(inverse, value, n, apart, a, d, C: tl.constexpr):
    """Writes block (a, d) of the n-th matrix (C, C) in as many parts as the dtype takes; apart: matrices from one to the next."""
    low: tl.constexpr = inverse.dtype.element_ty
    place = tl.arange(0, LEAF)
    at = inverse + n * (C * C) + (place + LEAF * a)[:, None] * C + (place + LEAF * d)[None, :]
    part = nearest(value, low)
    tl.store(at, part)
    if low != tl.float32:
        rest = value - part.to(tl.float32)
        part = nearest(rest, low)
        tl.store(at + apart * (C * C), part)
        tl.store(at + 2 * apart * (C * C), (rest - part.to(tl.float32)).to(low))


@triton.jit
def decayed(value, a, d, coarse, fine, row, HAS_G: tl.constexpr):
    """Block (a, d) of the inverse times the decays from key to query; where a document border lies between, value is 0. row:
    where the chunk begins in coarse and fine (B, H, T)."""
    if HAS_G:
        query, key = row + LEAF * a + tl.arange(0, LEAF), row + LEAF * d + tl.arange(0, LEAF)
        between = tl.load(coarse + query)[:, None] - tl.load(coarse + key)[None, :]
        between += tl.load(fine + query)[:, None] - tl.load(fine + key)[None, :]
        value *= tl.exp(tl.minimum(between, 0.0))
    return value


@triton.jit
def store_inverse(inverse, strict, n, apart, coarse, fine, row, N: tl.constexpr, C: tl.constexpr, HAS_G: tl.constexpr):
    """Writes (I + S)^-1 . D as the n-th matrix, zeros above the diagonal."""
    leaves = leaf_inverses(strict, N)
    for d in tl.static_range(N):
        for a in tl.static_range(d):
            store_block(inverse, tl.zeros((LEAF, LEAF), tl.float32), n, apart, a, d, C)
        store_block(inverse, decayed(leaves[d], d, d, coarse, fine, row, HAS_G), n, apart, d, d, C)
        column = (leaves[d],)
        for a in tl.static_range(d + 1, N):
            moved = dot(strict[a * (a + 1) // 2 + d], column[0])
            for m in tl.static_range(d + 1, a):
                moved += dot(strict[a * (a + 1) // 2 + m], column[m - d])
            block = -dot(leaves[a], moved)
            store_block(inverse, decayed(block, a, d, coarse, fine, row, HAS_G), n, apart, a, d, C)
            column = column + (block,)


@triton.jit
def strict_blocks(overlap, u, first, head, b, c, T, N: tl.constexpr, HAS_U: tl.constexpr, HAS_DOCS: tl.constexpr):
    """Blocks of S, from those of k_i . k_j (decayed or not)."""
    place = tl.arange(0, LEAF)
    strict = ()
    for a in tl.static_range(N):
        query = place + LEAF * a
        beta = tl.full((LEAF,), 1.0, tl.float32)
        if HAS_U:
            beta = tl.load(u + head * T + c * (N * LEAF) + query)
        for d in tl.static_range(a + 1):
            key = place + LEAF * d
            meet = key[None, :] < query[:, None]
            if HAS_DOCS:
                begin = tl.load(first + b * T + c * (N * LEAF) + query)
                meet = meet & (begin[:, None] <= key[None, :])
            strict = strict + (tl.where(meet, overlap[a * (a + 1) // 2 + d] * beta[:, None], 0.0),)
    return strict


@triton.jit
def delta_solve(
    k, coarse, fine, u, first,
    T, J,
    inverse,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, C: tl.constexpr, KEYS: tl.constexpr,
    HAS_G: tl.constexpr, HAS_U: tl.constexpr, HAS_DOCS: tl.constexpr,
):  # fmt: skip
    """The inverses (B, H, J, C, C), from k (B, T, Hk, K), u (B, H, T) and first (B, T). Programs are (chunk, head, row)."""
    c, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = b * H + h
    N: tl.constexpr = C // LEAF
    overlap = ()
    for _ in tl.static_range(N * (N + 1) // 2):
        overlap = overlap + (tl.zeros((LEAF, LEAF), tl.float32),)
    for at in tl.static_range(0, K, KEYS):
        kk = at + tl.arange(0, KEYS)
        keys = ()
        for a in tl.static_range(N):
            keys = keys + (load_tokens(k, b, c * N + a, h // (H // HK), kk, T, HK, K, LEAF),)
        more = ()
        for a in tl.static_range(N):
            for d in tl.static_range(a + 1):
                more = more + (overlap[a * (a + 1) // 2 + d] + dot(keys[a], tl.trans(keys[d])),)
        overlap = more
    strict = strict_blocks(overlap, u, first, head, b, c, T, N, HAS_U, HAS_DOCS)
    row = head * T + c * C
    store_inverse(inverse, strict, head * J + c, tl.num_programs(2) * H * J, coarse, fine, row, N, C, HAS_G)


@triton.jit
def delta_invert(
    overlap, u, first,
    T, J,
    inverse,
    H: tl.constexpr, C: tl.constexpr, HAS_U: tl.constexpr, HAS_DOCS: tl.constexpr,
):  # fmt: skip
    """The same from overlap (B, H, J, C, C): k_i . k_j with the decays from j to i."""
    c, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = b * H + h
    N: tl.constexpr = C // LEAF
    place = tl.arange(0, LEAF)
    square = (head * J + c) * (C * C)
    blocks = ()
    for a in tl.static_range(N):
        for d in tl.static_range(a + 1):
            at = (place + LEAF * a)[:, None] * C + (place + LEAF * d)[None, :]
            blocks = blocks + (tl.load(overlap + square + at),)
    strict = strict_blocks(blocks, u, first, head, b, c, T, N, HAS_U, HAS_DOCS)
    store_inverse(inverse, strict, head * J + c, tl.num_programs(2) * H * J, u, u, 0, N, C, False)
