"""TPU kernels (Pallas, Mosaic): blocks of tokens come one after another, the state of a block of channels stays in VMEM.

Rows are float32 inside: a single row of a packed bfloat16 tile cannot be addressed. Complex numbers have no kernel here.

Status: numbers checked in interpret mode, programs lowered; not run on a TPU.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from mlt_kernels import pallas
from mlt_kernels.diagonal_recurrence._march import PADDING, START, marks, pad, padded

TOKENS = 128
"""Tokens of a block: one tile of marks."""
CHANNELS = 512
"""The most channels of a block."""
UNROLL = 8
"""Tokens of one turn of the loop."""
EDGE = 8
"""Rows of the neighbouring block that come along: one tile, for the state at the border."""


class Options(NamedTuple):
    """What is static in a call."""

    reverse: bool
    width: int
    interpret: bool


def unsupported(*, a: Array, state_dtype: Any, **_: Any) -> str | None:
    reason = pallas.unsupported_platform("tpu")
    if reason:
        return reason
    if jnp.dtype(state_dtype) != jnp.float32:
        return f"states of {jnp.dtype(state_dtype).name}; its kernels compute in float32, complex numbers excluded"
    return f"a has shape {a.shape}: nothing to compute" if 0 in a.shape else None


def run(
    *, a: Array, b: Array, initial_state: Array | None, segment_ids: Array | None, reverse: bool, state_dtype: Any
) -> tuple[Array, Array]:
    shape, (B, T), E = a.shape, a.shape[:2], math.prod(a.shape[2:])
    width = min(CHANNELS, padded(E, 128))
    sizes = {1: padded(T, TOKENS), 2: padded(E, width)}
    start = jnp.zeros((B, 1, E), state_dtype) if initial_state is None else initial_state.astype(state_dtype)
    a, b, start = (pad(x.astype(state_dtype).reshape(B, -1, E), {2: sizes[2]}) for x in (a, b, start))
    a, b = (pad(x, sizes) for x in (a, b))
    mark_B1T = marks(segment_ids, (B, T), sizes[1], reverse)[:, None]
    found: Any = _recur(a, b, start, mark_B1T, Options(reverse, width, pallas.interpreting()))
    h, final = found
    return h[:, :T, :E].reshape(shape), final[:, 0, :E].reshape(B, *shape[2:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _recur(a: Array, b: Array, start_B1E: Array, mark_B1T: Array, options: Options) -> tuple[Array, Array]:
    """(h, final state) of whole blocks."""
    return _forward(a, b, start_B1E, mark_B1T, options)[0]


def _forward(a: Array, b: Array, start_B1E: Array, mark_B1T: Array, options: Options) -> tuple[Any, Any]:
    (row, end, mark, _), grid = _specs(a.shape, options, options.reverse)
    h, final = pl.pallas_call(
        functools.partial(_forward_kernel, options=options),
        grid=grid,
        in_specs=[row, row, end, mark],
        out_specs=[row, end],
        out_shape=[jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (a, start_B1E)],
        scratch_shapes=[tpu.VMEM((1, options.width), jnp.float32)],
        interpret=options.interpret,
        compiler_params=pallas.tpu_params(dimension_semantics=("parallel", "parallel", "arbitrary")),
        name="diagonal_recurrence_forward",
    )(a, b, start_B1E, mark_B1T)
    return (h, final), (a, h, start_B1E, mark_B1T)


def _backward(options: Options, saved: Any, cts: tuple[Array, Array]) -> tuple[Any, ...]:
    a, h, start_B1E, mark_B1T = saved
    ct_h, ct_final = cts
    (row, end, mark, edge), grid = _specs(a.shape, options, not options.reverse)
    da, db, dstart = pl.pallas_call(
        functools.partial(_backward_kernel, options=options),
        grid=grid,
        in_specs=[row, row, edge, row, end, end, mark],
        out_specs=[row, row, end],
        out_shape=[jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (a, a, start_B1E)],
        scratch_shapes=[tpu.VMEM((1, options.width), jnp.float32)],
        interpret=options.interpret,
        compiler_params=pallas.tpu_params(dimension_semantics=("parallel", "parallel", "arbitrary")),
        name="diagonal_recurrence_backward",
    )(a, h, h, ct_h, start_B1E, ct_final, mark_B1T)
    return da, db, dstart, None


_recur.defvjp(_forward, _backward)


def _forward_kernel(a, b, start, mark, h, final, state, *, options: Options) -> None:
    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        state[...] = start[...]

    def token(i: Any, state_1W: Array) -> Array:
        t = TOKENS - 1 - i if options.reverse else i
        kind, row = mark[0, t], pl.ds(t, 1)
        kept = jnp.where(kind == START, 0.0, state_1W)
        state_1W = jnp.where(kind == PADDING, state_1W, a[row, :] * kept + b[row, :])
        h[row, :] = state_1W
        return state_1W

    state[...] = jax.lax.fori_loop(0, TOKENS, token, state[...], unroll=UNROLL)
    final[...] = state[...]


def _backward_kernel(a, h, edge, ct, start, behind, mark, da, db, dstart, state, *, options: Options) -> None:
    """Runs the other way: `state` is the cotangent that comes from the tokens behind."""
    step, last = pl.program_id(2), pl.num_programs(2) - 1

    @pl.when(step == 0)
    def _() -> None:
        state[...] = behind[...]

    # The state in front of the block: the last one of the block before it in the order of the run.
    border = 0 if options.reverse else EDGE - 1
    entering_1W = jnp.where(step == last, start[...], edge[border : border + 1, :])
    first = TOKENS - 1 if options.reverse else 0

    def token(i: Any, state_1W: Array) -> Array:
        t = i if options.reverse else TOKENS - 1 - i
        earlier = jnp.clip(t + (1 if options.reverse else -1), 0, TOKENS - 1)
        kind, row = mark[0, t], pl.ds(t, 1)
        g_1W = ct[row, :] + state_1W
        before_1W = jnp.where(t == first, entering_1W, h[pl.ds(earlier, 1), :])
        fresh, padding = kind == START, kind == PADDING
        da[row, :] = jnp.where(fresh | padding, 0.0, g_1W * before_1W)
        db[row, :] = jnp.where(padding, 0.0, g_1W)
        return jnp.where(padding, g_1W, jnp.where(fresh, 0.0, a[row, :] * g_1W))

    state[...] = jax.lax.fori_loop(0, TOKENS, token, state[...], unroll=UNROLL)
    dstart[...] = state[...]


def _specs(shape: tuple[int, ...], options: Options, from_last: bool) -> tuple[tuple[pl.BlockSpec, ...], tuple[int, ...]]:
    """Blocks of (rows, states, marks, rows at the border) and the grid (batch, channels, tokens); tokens run in order."""
    (B, T, E), width = shape, options.width
    blocks, tiles = T // TOKENS, TOKENS // EDGE

    def at(i: Any) -> Any:
        return blocks - 1 - i if from_last else i

    def border(i: Any) -> Any:
        return jnp.minimum((at(i) + 1) * tiles, T // EDGE - 1) if options.reverse else jnp.maximum(at(i) * tiles - 1, 0)

    row = pl.BlockSpec((None, TOKENS, width), lambda b, e, i: (b, at(i), e))
    end = pl.BlockSpec((None, 1, width), lambda b, e, i: (b, 0, e))
    mark = pl.BlockSpec((None, 1, TOKENS), lambda b, e, i: (b, 0, at(i)), memory_space=tpu.SMEM)
    edge = pl.BlockSpec((None, EDGE, width), lambda b, e, i: (b, border(i), e))
    return (row, end, mark, edge), (B, E // width, blocks)
