"""Decays of one chunk, as Triton kernels make them that have no decay or one decay a head; and what those decays feel.

coarse, fine (B, H, T) float32: sums of log decays since the chunk or the document began, as a coarse part and a rest, see
`_kernel_inputs.decay_sums`. first (B, T) and first_end (B, J) int32: where documents begin, see `_kernel_inputs.Documents`.
"""

import triton
import triton.language as tl


@triton.jit
def factors(
    coarse, fine, first, first_end, b, head, c, T, J,
    C: tl.constexpr, HAS_G: tl.constexpr, HAS_DOCS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Decays of chunk c of row b and head b H + h. No exponent is above 0.

    Returns:
      pair (C, C) from j to i, 0 where they do not meet, as (j, i) if TRANSPOSED; into (C,) from the chunk's start to i; out (C,)
      from j to its end; kept, of the state that entered. The last three are 0 across a document border.
    """
    place = tl.arange(0, C)
    lower = place[None, :] >= place[:, None] if TRANSPOSED else place[:, None] >= place[None, :]
    carried = place >= 0  # without documents all of these hold
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
def felt_by_pairs(weight, C: tl.constexpr):
    """(C,): what the decay of token t feels of the pairs that it lies between, the sum of weight (i, j) over j < t <= i.

    Pair by pair: by way of sums over all queries or keys it were a small difference of large numbers. weight is 0 on and above
    the diagonal."""
    place = tl.arange(0, C)
    earlier = tl.cumsum(weight, axis=1) - weight
    return tl.sum(tl.where(place[:, None] >= place[None, :], earlier, 0.0), axis=0)
