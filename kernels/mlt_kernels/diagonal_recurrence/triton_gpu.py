"""GPU kernels in Triton, called through jax-triton: a program owns a few channels and walks along its row in tiles.

Rows stay as they are, (B, T, E), of any length and width. A tile is one associative scan over its tokens, begun from the
state that the tile before left in registers; the backward walk reads a, h and the cotangent of h once each. Where rows and
channels give too few programs to fill a GPU, rows are cut into pieces: a first kernel finds what each piece does to the
state that enters it, a fold over the pieces finds these states, and the pieces then run side by side. A reset is a factor of
exact zero inside the scan, so no finite number of another document leaves a bit. Complex numbers are pairs of real arrays.

Status: numbers checked in Triton's interpreter, programs lowered and compiled for sm_90; not run on a GPU.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mlt_kernels import triton_calls, tuned
from mlt_kernels.diagonal_recurrence._march import ORDINARY, PADDING, START, marks, padded
from mlt_kernels.grids import unsupported_shape

KERNELS = "diagonal_recurrence._triton_kernels"
TOKENS, CHANNELS, WARPS, STAGES = 32, 64, 4, 2
"""A tile: 16 numbers a thread, and the loads of the next tile under way."""
ENOUGH_PROGRAMS = 264
"""Two for each multiprocessor of an H100 or H200; with fewer, rows are cut."""
SHORTEST_PIECE = 512
"""Tokens of a piece at least: rows that are cut are read once more, and the fold over pieces is serial."""

Planes = tuple[Array, Array | None]
"""The real and the imaginary part, None for real numbers."""


class Tile(NamedTuple):
    """Sizes of the tiles of a walk, with warps and pipeline stages."""

    tokens: int
    channels: int
    warps: int
    stages: int


class Options(NamedTuple):
    """What is static in a call; pieces of `piece` tokens run side by side."""

    reverse: bool
    tile: Tile
    piece: int
    interpret: bool


def unsupported(*, a: Array, state_dtype: Any, **_: Any) -> str | None:
    reason = triton_calls.unsupported()
    if reason:
        return reason
    if jnp.dtype(state_dtype) not in (jnp.float32, jnp.complex64):
        return f"states of {jnp.dtype(state_dtype).name}; its kernels compute in float32"
    return unsupported_shape("a", a.shape)


def run(
    *, a: Array, b: Array, initial_state: Array | None, segment_ids: Array | None, reverse: bool, state_dtype: Any
) -> tuple[Array, Array]:
    (B, T), E = a.shape[:2], math.prod(a.shape[2:])
    is_complex = jnp.issubdtype(state_dtype, jnp.complexfloating)
    kind = jnp.dtype(jnp.float32) if is_complex else jnp.result_type(a, b)

    def planes(x: Array, *shape: int) -> Planes:
        return x.real.reshape(shape), x.imag.reshape(shape) if is_complex else None

    def rows(x: Array) -> Planes:
        return planes(x.astype(state_dtype if is_complex else kind), B, T, E)

    start = jnp.zeros((B, E), state_dtype) if initial_state is None else initial_state.astype(state_dtype)
    mark_BT = None if segment_ids is None else marks(segment_ids, (B, T), T, reverse)
    tile = _tile(is_complex, kind)
    options = Options(reverse, tile, _piece(B * -(-E // tile.channels), T, tile.tokens), triton_calls.interpreting())
    found: Any = _recur(rows(a), rows(b), planes(start, B, E), mark_BT, options)
    h, final = (jax.lax.complex(*parts) if is_complex else parts[0] for parts in found)
    return h.reshape(a.shape), final.reshape(B, *a.shape[2:])


def _tile(is_complex: bool, kind: Any) -> Tile:
    rule = {"tokens": TOKENS, "channels": CHANNELS, "warps": WARPS, "stages": STAGES}
    shape = {"complex": bool(is_complex), "item_bytes": jnp.dtype(kind).itemsize}
    return Tile(**tuned.sizes("diagonal_recurrence", "triton_gpu", "walk", shape, rule))


def _piece(programs: int, tokens: int, tile: int) -> int:
    """Tokens of a piece, whole tiles: short enough to fill the card with this many programs a piece, but not too short."""
    pieces = max(1, min(-(-ENOUGH_PROGRAMS // programs), tokens // SHORTEST_PIECE))
    return padded(-(-tokens // pieces), tile)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _recur(a: Planes, b: Planes, start: Planes, mark_BT: Array | None, options: Options) -> tuple[Planes, Planes]:
    """(h in the type of a, final state in float32)."""
    return _forward(a, b, start, mark_BT, options)[0]


def _forward(a: Planes, b: Planes, start: Planes, mark_BT: Array | None, options: Options) -> tuple[Any, Any]:
    entering = _entering(a, b, start, mark_BT, options, backward=False)
    inputs = [*a, *b, mark_BT, *entering]
    *h, last, last_im = _call("forward", options, inputs, a, mark_BT, rows_out=2, ends_out=2)
    return (tuple(h), (last[:, -1], None if last_im is None else last_im[:, -1])), (a, tuple(h), start, mark_BT)


def _backward(options: Options, saved: Any, cts: tuple[Planes, Planes]) -> tuple[Any, ...]:
    """With g_t the cotangent of h_t after all its uses, g_t = ct_t + conj(a_{t+1}) g_{t+1}: the walk the other way."""
    a, h, start, mark_BT = saved
    back = options._replace(reverse=not options.reverse)
    with triton_calls.interpret(options.interpret):
        entering = _entering(a, cts[0], cts[1], mark_BT, back, backward=True)
        inputs = [*a, *h, *cts[0], mark_BT, *start, *entering]
        da, da_im, db, db_im, g, g_im = _call("backward", back, inputs, a, mark_BT, rows_out=4, ends_out=2)
    g = (g[:, -1], None if g_im is None else g_im[:, -1])
    return (da, da_im), (db, db_im), _mul(_first_factor(a, mark_BT, options.reverse), g, conjugate=True), None


_recur.defvjp(_forward, _backward)


def _first_factor(a: Planes, mark_BT: Array | None, reverse: bool) -> Planes:
    """(B, E): what the first step of the walk multiplies the start with."""
    edge = -1 if reverse else 0
    kind = jnp.full((a[0].shape[0], 1), ORDINARY) if mark_BT is None else mark_BT[:, edge, None]
    whole = (jnp.where(kind == PADDING, one, part[:, edge]) for one, part in zip((1.0, 0.0), a, strict=True) if part is not None)
    parts = [jnp.where(kind == START, 0.0, x).astype(jnp.float32) for x in whole]
    return parts[0], parts[1] if len(parts) > 1 else None


def _entering(a: Planes, b: Planes, start: Planes, mark_BT: Array | None, options: Options, *, backward: bool) -> Planes:
    """(B, P, E): states that enter the pieces, from what enters the row."""
    start_BE, start_im = (None if x is None else x[:, None].astype(jnp.float32) for x in start)
    assert start_BE is not None
    if a[0].shape[1] <= options.piece:
        return start_BE, start_im
    inputs = [*a, *b, mark_BT]
    found = _call("ends", options, inputs, a, mark_BT, rows_out=0, ends_out=4, BACKWARD=backward)

    def piece(state: Planes, through: Any) -> tuple[Planes, Planes]:
        factor, end = through
        return _add(_mul(factor, state), end), state

    pieces_first = [None if x is None else jnp.moveaxis(x, 1, 0) for x in found]
    carry = (start_BE[:, 0], None if start_im is None else start_im[:, 0])
    _, entering = jax.lax.scan(piece, carry, ((pieces_first[0], pieces_first[1]), (pieces_first[2], pieces_first[3])))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), entering)


def _mul(x: Planes, y: Planes, *, conjugate: bool = False) -> Planes:
    """x y, or conj(x) y."""
    if x[1] is None or y[1] is None:
        return x[0] * y[0], None
    x_im = -x[1] if conjugate else x[1]
    return x[0] * y[0] - x_im * y[1], x[0] * y[1] + x_im * y[0]


def _add(x: Planes, y: Planes) -> Planes:
    return x[0] + y[0], None if x[1] is None or y[1] is None else x[1] + y[1]


def _call(
    kernel: str,
    options: Options,
    inputs: list[Array | None],
    a: Planes,
    mark_BT: Array | None,
    *,
    rows_out: int,
    ends_out: int,
    **more: Any,
) -> list[Any]:
    """Runs a kernel; of its results, (B, T, E) and (B, P, E), the imaginary ones of real numbers are None."""
    (B, T, E), is_complex = a[0].shape, a[1] is not None
    pieces = -(-T // options.piece)
    row, end = jax.ShapeDtypeStruct((B, T, E), a[0].dtype), jax.ShapeDtypeStruct((B, pieces, E), jnp.float32)
    unused = jax.ShapeDtypeStruct((1,), jnp.float32)
    outputs = [row] * rows_out + [end] * ends_out
    outputs = [out if is_complex or n % 2 == 0 else unused for n, out in enumerate(outputs)]
    nothing = triton_calls.nothing()
    results = triton_calls.call(
        f"{KERNELS}:{kernel}",
        [*(nothing if x is None else x for x in inputs), T],
        outputs,
        grid=(-(-E // options.tile.channels), pieces, B),
        warps=options.tile.warps,
        E=E,
        REVERSE=options.reverse,
        COMPLEX=is_complex,
        HAS_MARKS=mark_BT is not None,
        PIECE=options.piece,
        TOKENS=options.tile.tokens,
        CHANNELS=options.tile.channels,
        STAGES=options.tile.stages,
        **more,
    )
    return [None if out is unused else x for out, x in zip(outputs, results, strict=True)]
