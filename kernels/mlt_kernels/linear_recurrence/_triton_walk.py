"""What the Triton kernels share that walk over the chunks of a head: states that enter and leave, and write strengths.

A walk keeps the state that enters every STRIDE-th chunk for the caller, or the one that enters the last of every STRIDE chunks
as an anchor for the decays' gradients: such arrays are (B, N, H, K, V), one for each group of STRIDE chunks, the last of them
shorter. Names of arguments as in `_triton_tiles`; J is the number of chunks.
"""

import triton
import triton.language as tl

from mlt_kernels.linear_recurrence._triton_tiles import load_state, store_state


@triton.jit
def entering(initial, n, kk, vv, K: tl.constexpr, V: tl.constexpr, HAS_INITIAL: tl.constexpr):
    """(len(kk), len(vv)): the state that a walk begins with, zeros or the n-th of initial (..., K, V)."""
    if HAS_INITIAL:
        return load_state(initial, n, kk, vv, K, V)
    return tl.zeros((kk.shape[0], vv.shape[0]), tl.float32)


@triton.jit
def group(b, c, h, J, H: tl.constexpr, STRIDE: tl.constexpr):
    """Which state of (B, N, H, K, V) belongs to the group of STRIDE chunks that chunk c is in."""
    return (b * tl.cdiv(J, STRIDE) + c // STRIDE) * H + h


@triton.jit
def ends_group(c, J, STRIDE: tl.constexpr):
    """Whether chunk c is the last of its group."""
    return ((c + 1) % STRIDE == 0) | (c + 1 == J)


@triton.jit
def keep_first(states, state, b, c, h, kk, vv, J, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, STRIDE: tl.constexpr):
    """Writes the state that enters chunk c if a group begins with it; STRIDE 0: nothing is kept."""
    if STRIDE > 0:  # noqa: SIM102 (one `if` of the compiler, one of the kernel)
        if c % STRIDE == 0:
            store_state(states, state, group(b, c, h, J, H, STRIDE), kk, vv, K, V)


@triton.jit
def keep_last(anchors, state, b, c, h, kk, vv, J, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, STRIDE: tl.constexpr):
    """Writes the state of chunk c if a group ends with it."""
    if ends_group(c, J, STRIDE):
        store_state(anchors, state, group(b, c, h, J, H, STRIDE), kk, vv, K, V)


@triton.jit
def with_cotangent(
    d_state, d_states, b, c, h, kk, vv, J,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HAS_STATES: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """d_state (len(kk), len(vv)) and, if a group begins with chunk c, the cotangent of the state that the caller got there."""
    if HAS_STATES:  # noqa: SIM102
        if c % STRIDE == 0:
            d_state += load_state(d_states, group(b, c, h, J, H, STRIDE), kk, vv, K, V)
    return d_state


@triton.jit
def load_writes(u, head, c, T, C: tl.constexpr, HAS_U: tl.constexpr):
    """(C,): write strengths of u (B, H, T), or ones. head is b H + h."""
    if HAS_U:
        return tl.load(u + head * T + c * C + tl.arange(0, C))
    return tl.full((C,), 1.0, tl.float32)
