"""What the Triton kernels of the delta rule share: products that keep what cancels, gradients by way of pairs and states.

W is what a chunk writes and X its cotangent behind the inverse, both float32. Letters: see `_triton_delta_call`.
"""

import triton
import triton.language as tl

from mlt_kernels.linear_recurrence._triton_tiles import (
    INTERPRETED,
    dot,
    load_square,
    load_state,
    load_tokens,
    store_square,
    store_tokens,
)


@triton.jit
def nearest(x, low: tl.constexpr):
    """x in low, rounded to nearest as a GPU does it: the interpreter would cut it."""
    if INTERPRETED:  # noqa: SIM102
        if x.dtype == tl.float32 and low == tl.bfloat16:
            bits = x.to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
            x = bits.to(tl.float32, bitcast=True)
    return x.to(low)


@triton.jit
def rest_of(x, low: tl.constexpr):
    """What of x, float32, is left by rounding to low, in low."""
    return nearest(x - nearest(x, low).to(tl.float32), low)


@triton.jit
def fine_dot(a, b, low: tl.constexpr):
    """Product of tiles of type low or float32, accumulated in float32. Float32 ones go in as two parts of type low each, 16 bits
    for bfloat16, without the product of both rests.

    Where keys repeat and beta is 2, a chunk's writes are twice its state with signs that alternate: rounded to bfloat16 one by
    one, 64 of them leave an error of some 2 % in every sum over tokens. So is what tokens weigh in such a sum.
    """
    product = dot(nearest(a, low), nearest(b, low))
    if a.dtype != low:
        product += dot(rest_of(a, low), nearest(b, low))
    if b.dtype != low:
        product += dot(nearest(a, low), rest_of(b, low))
    return product


@triton.jit
def stored_dot(a, rest, b, low: tl.constexpr):
    """The same of a that was stored in its two parts and b float32 or of type low; beside float32 operands a has no rest."""
    product = fine_dot(a, b, low)
    if low != tl.float32:
        product += dot(rest, nearest(b, low))
    return product


@triton.jit
def store_square_parts(x, value, n, apart, C: tl.constexpr):
    """Writes value (C, C) float32 to the n-th of x (P, .., C, C), in two parts that add up to it, one in float32. apart: matrices
    from one to the next."""
    low: tl.constexpr = x.dtype.element_ty
    store_square(x, nearest(value, low), n, C)
    if low != tl.float32:
        store_square(x, rest_of(value, low), apart + n, C)


@triton.jit
def load_square_rest(x, n, apart, C: tl.constexpr):
    """The second part, or where there is none the first."""
    low: tl.constexpr = x.dtype.element_ty
    return load_square(x, n if low == tl.float32 else apart + n, C)


@triton.jit
def store_token_parts(x, value, b, c, h, d, T, heads: tl.constexpr, D: tl.constexpr, C: tl.constexpr):
    """Writes value (C, len(d)) float32 to x (P, B, T, heads, D) in such parts."""
    low: tl.constexpr = x.dtype.element_ty
    store_tokens(x, nearest(value, low), b, c, h, d, T, heads, D, C)
    if low != tl.float32:
        store_tokens(x, rest_of(value, low), tl.num_programs(2) + b, c, h, d, T, heads, D, C)


@triton.jit
def load_token_rest(x, b, c, h, d, T, heads: tl.constexpr, D: tl.constexpr, C: tl.constexpr):
    """The second part, or where there is none the first."""
    low: tl.constexpr = x.dtype.element_ty
    return load_tokens(x, b if low == tl.float32 else tl.num_programs(2) + b, c, h, d, T, heads, D, C)


@triton.jit
def _applied(inverse, n, apart, right, low: tl.constexpr, C: tl.constexpr, TRANSPOSED: tl.constexpr):
    """An inverse of `delta_solve`, or its transpose, times right (C, D) float32."""
    first = load_square(inverse, n, C)
    if TRANSPOSED:
        first = tl.trans(first)
    if low == tl.float32:
        return dot(first, right)
    second, third = load_square(inverse, apart + n, C), load_square(inverse, 2 * apart + n, C)
    if TRANSPOSED:
        second, third = tl.trans(second), tl.trans(third)
    high, rest = nearest(right, low), rest_of(right, low)
    return dot(third, high) + dot(second, rest) + dot(second, high) + dot(first, rest) + dot(first, high)


@triton.jit
def solved(inverse, n, apart, strict, right, low: tl.constexpr, C: tl.constexpr, TRANSPOSED: tl.constexpr = False):
    """(I + S)^-1 R in float32, or with its transpose, by the n-th inverse. apart: matrices from one part of it to the next.

    Refined once by strict, S, beside float32 operands: the stored inverse is right to float32, yet where keys repeat a product
    with it loses more to rounding than substitution would. Beside others strict is not looked at.
    """
    solution = _applied(inverse, n, apart, right, low, C, TRANSPOSED)
    if low == tl.float32:
        solution += _applied(inverse, n, apart, right - solution - dot(strict, solution), low, C, TRANSPOSED)
    return solution


@triton.jit
def by_pairs(
    do, write, pull, v, dv, u_C, b, c, h, T,
    H: tl.constexpr, V: tl.constexpr, C: tl.constexpr, VALUES: tl.constexpr, GATED: tl.constexpr, low: tl.constexpr,
):  # fmt: skip
    """Of chunk c, from the cotangent dO of o, W and X (B, T, H, V): writes dv and gives what write strengths feel of v (C,),
    dO W^T and X W^T (C, C)."""
    du_C = tl.zeros((C,), tl.float32)
    by_query = tl.zeros((C, C), tl.float32)
    by_key = tl.zeros((C, C), tl.float32)
    for at in range(0, V, VALUES):
        vv = at + tl.arange(0, VALUES)
        do_CV = load_tokens(do, b, c, h, vv, T, H, V, C)
        write_CV = load_tokens(write, b, c, h, vv, T, H, V, C)
        pull_CV = load_tokens(pull, b, c, h, vv, T, H, V, C)
        store_tokens(dv, u_C[:, None] * pull_CV, b, c, h, vv, T, H, V, C)
        if GATED:
            v_CV = load_tokens(v, b, c, h, vv, T, H, V, C).to(tl.float32)
            du_C += tl.sum(v_CV * pull_CV, axis=1)
        by_query += fine_dot(do_CV, tl.trans(write_CV), low)
        by_key += fine_dot(pull_CV, tl.trans(write_CV), low)
    return du_C, by_query, by_key


@triton.jit
def by_states(
    do, write, pull, states, d_states, b, c, h, kk, T, J,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, PASSED: tl.constexpr, low: tl.constexpr,
):  # fmt: skip
    """Of chunk c and KEYS keys, with S the state that enters and dS' the cotangent of the one that leaves (B, J, H, K, V):
    dO S^T, X S^T and W dS'^T (C, KEYS), and with PASSED the sum of S dS' over V (KEYS,)."""
    read_q = tl.zeros((C, KEYS), tl.float32)
    read_k = tl.zeros((C, KEYS), tl.float32)
    left = tl.zeros((C, KEYS), tl.float32)
    passed = tl.zeros((KEYS,), tl.float32)
    for at in range(0, V, VALUES):
        vv = at + tl.arange(0, VALUES)
        do_CV = load_tokens(do, b, c, h, vv, T, H, V, C)
        write_CV = load_tokens(write, b, c, h, vv, T, H, V, C)
        pull_CV = load_tokens(pull, b, c, h, vv, T, H, V, C)
        state = load_state(states, (b * J + c) * H + h, kk, vv, K, V)
        d_state = load_state(d_states, (b * J + c) * H + h, kk, vv, K, V)
        read_q += dot(do_CV, tl.trans(state))
        read_k += fine_dot(pull_CV, tl.trans(state), low)
        left += fine_dot(write_CV, tl.trans(d_state), low)
        if PASSED:
            passed += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), axis=1)
    return read_q, read_k, left, passed
