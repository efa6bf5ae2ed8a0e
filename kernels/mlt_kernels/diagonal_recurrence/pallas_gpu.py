"""GPU kernels (Pallas, Triton): a program owns a few channels of a row and walks along its tokens.

Rows stay as they are, (B, T, E): one warp reads the channels of a token at once, a group of tokens ahead; the state is a
register. The backward walk reads a, h and the cotangent of h once each. Where rows and channels give too few programs to
fill a GPU, rows are cut into pieces: a first kernel finds what each piece does to the state that enters it, a fold over
the pieces finds these states, and the pieces then run side by side. Complex numbers are pairs of real arrays.

Status: numbers checked in interpret mode, programs lowered and compiled for an H200; not run on a GPU.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from mlt_kernels import pallas, tuned
from mlt_kernels.diagonal_recurrence._march import PADDING, START, march, marks, pad, padded

GROUP = 16
"""Tokens loaded at once."""
CHANNELS = {2: 64, 4: 32}
"""Channels of a program by the bytes of a number: 128 bytes of a token are one load of a warp."""
ENOUGH_PROGRAMS = 264
"""Two for each multiprocessor of an H100 or H200; with fewer, rows are cut."""
SHORTEST_PIECE = 512
"""Tokens of a piece at least: rows that are cut are read once more, and the fold over pieces is serial."""

Planes = tuple[Array, ...]
"""One real array, or the real and the imaginary part."""


class Options(NamedTuple):
    """What is static in a call; `pieces` of each row run side by side."""

    reverse: bool
    width: int
    pieces: int
    interpret: bool


def unsupported(*, a: Array, state_dtype: Any, **_: Any) -> str | None:
    reason = pallas.unsupported_platform("gpu")
    if reason:
        return reason
    if jnp.dtype(state_dtype) not in (jnp.float32, jnp.complex64):
        return f"states of {jnp.dtype(state_dtype).name}; its kernels compute in float32"
    return f"a has shape {a.shape}: nothing to compute" if 0 in a.shape else None


def run(
    *, a: Array, b: Array, initial_state: Array | None, segment_ids: Array | None, reverse: bool, state_dtype: Any
) -> tuple[Array, Array]:
    shape, (B, T), E = a.shape, a.shape[:2], math.prod(a.shape[2:])
    is_complex = jnp.issubdtype(state_dtype, jnp.complexfloating)
    kind = jnp.dtype(jnp.float32) if is_complex else jnp.result_type(a, b)
    rule, size = {"channels": CHANNELS[kind.itemsize]}, {"item_bytes": kind.itemsize}
    width = min(tuned.sizes("diagonal_recurrence", "pallas_gpu", "walk", size, rule)["channels"], pl.next_power_of_2(E))
    tokens, channels = padded(T, GROUP), padded(E, width)
    options = Options(reverse, width, _pieces(B * channels // width, tokens), pallas.interpreting())

    def planes(x: Array, *shape: int) -> Planes:
        parts = (x.real, x.imag) if is_complex else (x,)
        return tuple(part.reshape(shape) for part in parts)

    def rows(x: Array) -> Planes:
        return tuple(pad(part.astype(kind), {1: tokens, 2: channels}) for part in planes(x, B, T, E))

    start = jnp.zeros((B, E), state_dtype) if initial_state is None else initial_state.astype(state_dtype)
    starts = tuple(pad(part, {1: channels}) for part in planes(start, B, E))
    found: Any = _recur(rows(a), rows(b), starts, marks(segment_ids, (B, T), tokens, reverse), options)
    h, final = found

    def joined(parts: Planes) -> Array:
        return jax.lax.complex(*parts) if is_complex else parts[0]

    return joined(tuple(part[:, :T, :E] for part in h)).reshape(shape), (
        joined(tuple(part[:, :E] for part in final)).reshape(B, *shape[2:])
    )


def _pieces(programs: int, tokens: int) -> int:
    """Pieces of a row, a power of two: enough to fill the card if they stay long enough."""
    pieces = 1
    while programs * pieces < ENOUGH_PROGRAMS and tokens % (2 * pieces * GROUP) == 0 and tokens // (2 * pieces) >= SHORTEST_PIECE:
        pieces *= 2
    return pieces


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _recur(a: Planes, b: Planes, start: Planes, mark_BT: Array, options: Options) -> tuple[Planes, Planes]:
    """(h in the type of a, final state in float32) of whole groups and blocks."""
    return _forward(a, b, start, mark_BT, options)[0]


def _forward(a: Planes, b: Planes, start: Planes, mark_BT: Array, options: Options) -> tuple[Any, Any]:
    n = len(a)
    if options.pieces > 1:
        found = _call(_ends_kernel, options, (*a, *b), (), mark_BT, rows_out=0, ends_out=2 * n)
        start = _fold(found[:n], found[n:], start, options)
    outputs = _call(_forward_kernel, options, (*a, *b), start, mark_BT, rows_out=n, ends_out=n)
    return (outputs[:n], _last(outputs[n:], options)), (a, outputs[:n], start, mark_BT)


def _backward(options: Options, saved: Any, cts: tuple[Planes, Planes]) -> tuple[Any, ...]:
    """With g_t the cotangent of h_t after all its uses, g_t = ct_t + a_{t+1} g_{t+1}: the walk the other way."""
    a, h, start, mark_BT = saved
    ct_h, behind = cts
    n, back = len(a), options._replace(reverse=not options.reverse)
    if options.pieces > 1:
        kernel = functools.partial(_ends_kernel, backward=True)
        found = _call(kernel, back, (*a, *ct_h), (), mark_BT, rows_out=0, ends_out=2 * n)
        behind = _fold(found[:n], found[n:], behind, back)
    outputs = _call(_backward_kernel, back, (*a, *h, *ct_h), (*start, *behind), mark_BT, rows_out=2 * n, ends_out=n)
    return outputs[:n], outputs[n : 2 * n], _last(outputs[2 * n :], back), None


_recur.defvjp(_forward, _backward)


def _forward_kernel(*refs: Any, options: Options) -> None:
    """rows: a, b -> h; ends: start -> final. The last reference in is the marks."""
    n = (len(refs) - 1) // 5
    a, b, start, (mark,), h, final = _split(refs, n, n, n, 1, n, n)

    def step(t: Any, loaded: Any, state: Planes) -> Planes:
        factor, write, _ = _coefficients(*loaded)
        state = _add(_mul(factor, state), write)
        for ref, part in zip(h, state, strict=True):
            ref[t, :] = part.astype(ref.dtype)
        return state

    state = _walk(mark, (a, b), step, tuple(ref[...] for ref in start), options)
    for ref, part in zip(final, state, strict=True):
        ref[...] = part


def _ends_kernel(*refs: Any, options: Options, backward: bool = False) -> None:
    """rows: a, b -> ends: the factor that a piece puts on what enters it, and what leaves it if nothing enters.

    In the backward direction b is the cotangent of h, and a token's own factor also stands on its own write.
    """
    n = (len(refs) - 1) // 4
    a, b, (mark,), factors, leaving = _split(refs, n, n, 1, n, n)

    def step(t: Any, loaded: Any, carry: tuple[Planes, Planes]) -> tuple[Planes, Planes]:
        through, end = carry
        factor, write, _ = _coefficients(*loaded)
        if backward:
            factor = _conjugate(factor)
            return _mul(factor, through), _mul(factor, _add(end, loaded[2]))
        return _mul(factor, through), _add(_mul(factor, end), write)

    zero = jnp.zeros(factors[0].shape, jnp.float32)
    one = (zero + 1, zero)[:n]
    for refs_out, parts in zip((factors, leaving), _walk(mark, (a, b), step, (one, (zero, zero)[:n]), options), strict=True):
        for ref, part in zip(refs_out, parts, strict=True):
            ref[...] = part


def _backward_kernel(*refs: Any, options: Options) -> None:
    """rows: a, h, cotangent of h -> cotangents of a, b; ends: start, cotangent behind the row -> cotangent of start."""
    n = (len(refs) - 1) // 8
    a, h, ct, start, behind, (mark,), da, db, dstart = _split(refs, n, n, n, n, n, 1, n, n, n)
    tokens = mark.shape[0]
    first = 0 if options.reverse else tokens - 1
    before = -1 if options.reverse else 1
    entering = tuple(ref[...] for ref in start)

    def load(t: Any) -> Any:
        earlier = jnp.clip(t + before, 0, tokens - 1)
        return mark[t], _row(a, t), _row(ct, t), _row(h, earlier)

    def step(t: Any, loaded: Any, carry: Planes) -> Planes:
        factor, _, kind = _coefficients(*loaded[:3])
        g = _add(loaded[2], carry)
        earlier = tuple(jnp.where(t == first, e, h) for e, h in zip(entering, loaded[3], strict=True))
        for ref, part in zip(da, _mul(g, _conjugate(earlier)), strict=True):
            ref[t, :] = jnp.where((kind == START) | (kind == PADDING), 0, part).astype(ref.dtype)
        for ref, part in zip(db, g, strict=True):
            ref[t, :] = jnp.where(kind == PADDING, 0, part).astype(ref.dtype)
        return _mul(_conjugate(factor), g)

    carry = tuple(ref[...] for ref in behind)
    carry = march(tokens, GROUP, load, step, carry, reverse=options.reverse)
    for ref, part in zip(dstart, carry, strict=True):
        ref[...] = part


def _walk(mark: Any, rows: Sequence[Sequence[Any]], step: Callable[..., Any], carry: Any, options: Options) -> Any:
    def load(t: Any) -> Any:
        return mark[t], *(_row(refs, t) for refs in rows)

    return march(mark.shape[0], GROUP, load, step, carry, reverse=options.reverse)


def _row(refs: Sequence[Any], t: Any) -> Planes:
    return tuple(ref[t, :].astype(jnp.float32) for ref in refs)


def _coefficients(kind: Array, a: Planes, b: Planes) -> tuple[Planes, Planes, Array]:
    """(factor on the state, what is added, the mark): a reset is a factor of zero, padding one of one and no write."""
    fresh, padding = kind == START, kind == PADDING
    ones = (1.0, 0.0)
    factor = tuple(jnp.where(fresh, 0.0, jnp.where(padding, one, part)) for one, part in zip(ones, a, strict=False))
    return factor, tuple(jnp.where(padding, 0.0, part) for part in b), kind


def _mul(x: Planes, y: Planes) -> Planes:
    if len(x) == 1:
        return (x[0] * y[0],)
    return x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]


def _add(x: Planes, y: Planes) -> Planes:
    return tuple(left + right for left, right in zip(x, y, strict=True))


def _conjugate(x: Planes) -> Planes:
    return (x[0], *(-part for part in x[1:]))


def _split(refs: Sequence[Any], *counts: int) -> list[Sequence[Any]]:
    groups, at = [], 0
    for count in counts:
        groups.append(refs[at : at + count])
        at += count
    return groups


def _call(
    kernel: Callable[..., None],
    options: Options,
    rows: Planes,
    ends: Planes,
    mark_BT: Array,
    *,
    rows_out: int,
    ends_out: int,
) -> Planes:
    """Runs a kernel over rows (B, T, E) and states (B, E), or (B * pieces, E) where rows are cut."""
    (B, T, E), P, width = rows[0].shape, options.pieces, options.width
    row = pl.BlockSpec((None, T // P, width), lambda b, e: (b, 0, e))
    end = pl.BlockSpec((None, width), lambda b, e: (b, e))
    mark = pl.BlockSpec((None, T // P), lambda b, e: (b, 0))
    row_shape = jax.ShapeDtypeStruct((B * P, T // P, E), rows[0].dtype)
    end_shape = jax.ShapeDtypeStruct((B * P, E), jnp.float32)
    outputs = pl.pallas_call(
        functools.partial(kernel, options=options),
        grid=(B * P, E // width),
        in_specs=[row] * len(rows) + [end] * len(ends) + [mark],
        out_specs=[row] * rows_out + [end] * ends_out,
        out_shape=[row_shape] * rows_out + [end_shape] * ends_out,
        interpret=options.interpret,
        compiler_params=pallas.triton_params(num_warps=1, num_stages=1),
        name="diagonal_recurrence",
    )(*(x.reshape(row_shape.shape) for x in rows), *ends, mark_BT.reshape(B * P, T // P))
    return (*(x.reshape(B, T, E) for x in outputs[:rows_out]), *outputs[rows_out:])


def _fold(factors: Planes, leaving: Planes, start: Planes, options: Options) -> Planes:
    """States (B * pieces, E) that enter the pieces, from what enters the row."""

    def pieces_first(parts: Planes) -> Planes:
        return tuple(jnp.moveaxis(x.reshape(-1, options.pieces, x.shape[1]), 1, 0) for x in parts)

    def piece(state: Planes, found: tuple[Planes, Planes]) -> tuple[Planes, Planes]:
        return _add(_mul(found[0], state), found[1]), state

    found = (pieces_first(factors), pieces_first(leaving))
    _, entering = jax.lax.scan(piece, start, found, reverse=options.reverse)
    return tuple(jnp.moveaxis(x, 0, 1).reshape(factors[0].shape) for x in entering)


def _last(ends: Planes, options: Options) -> Planes:
    """What leaves the row, of what leaves its pieces."""
    edge = 0 if options.reverse else -1
    return tuple(x.reshape(-1, options.pieces, x.shape[1])[:, edge] for x in ends)
