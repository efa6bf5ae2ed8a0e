"""TPU kernels (Pallas, Mosaic): blocks of tokens come one after another, the states of a block of channels stay in VMEM.

A state tile is (N, W): states down the sublanes, channels along the lanes. B and C come as (B, N, T), so that a token's
column is one masked sum along the lanes. The forward pass keeps the state in front of every block; the backward pass
makes the states of a block again, in VMEM, and walks back over them. Rows are float32 inside.

Status: numbers checked in interpret mode, programs lowered; not run on a TPU.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from mlt_kernels import pallas
from mlt_kernels.diagonal_recurrence._march import PADDING, START, marks, pad, padded

TOKENS = 128
"""Tokens of a block: one tile of B and C."""
CHANNELS, MOST_STATES = 256, 64
"""The most channels of a block and states of a channel: the states of a block of the backward pass then take 8 MiB."""
UNROLL = 4
"""Tokens of one turn of the loop."""


class Options(NamedTuple):
    """What is static in a call."""

    width: int
    interpret: bool


Inputs = tuple[Array, Array, Array, Array]
"""x, step (B, T, D), B, C (B, N, T), float32."""


def unsupported(*, x: Array, A: Array, state_dtype: Any, **_: Any) -> str | None:
    reason = pallas.unsupported_platform("tpu")
    if reason:
        return reason
    if jnp.dtype(state_dtype) != jnp.float32:
        return f"states of {jnp.dtype(state_dtype).name}; its kernels compute in float32"
    if A.shape[1] > MOST_STATES:
        return f"{A.shape[1]} states a channel; its kernels hold at most {MOST_STATES}"
    return f"x has shape {x.shape}: nothing to compute" if 0 in x.shape else None


def run(
    *,
    x: Array,
    step: Array,
    A: Array,
    B: Array,
    C: Array,
    skip: Array | None,
    initial_state: Array | None,
    segment_ids: Array | None,
    state_dtype: Any,
) -> tuple[Array, Array]:
    (batch, T, D), states = x.shape, A.shape[1]
    width = min(CHANNELS, padded(D, 128))
    tokens, channels, N = padded(T, TOKENS), padded(D, width), padded(states, 8)
    rows = tuple(pad(v.astype(state_dtype), {1: tokens, 2: channels}) for v in (x, step))
    columns = tuple(pad(jnp.swapaxes(v.astype(state_dtype), 1, 2), {1: N, 2: tokens}) for v in (B, C))
    A_ND = pad(A.astype(state_dtype).T, {0: N, 1: channels})
    skip_1D = pad(jnp.zeros((1, D), state_dtype) if skip is None else skip.astype(state_dtype)[None], {1: channels})
    start = jnp.zeros((batch, D, states), state_dtype) if initial_state is None else initial_state.astype(state_dtype)
    start_BND = pad(jnp.swapaxes(start, 1, 2), {1: N, 2: channels})
    mark_B1T = marks(segment_ids, (batch, T), tokens)[:, None]
    found: Any = _scan((*rows, *columns), A_ND, skip_1D, start_BND, mark_B1T, Options(width, pallas.interpreting()))
    y, final_BND = found
    return y[:, :T, :D].astype(x.dtype), jnp.swapaxes(final_BND[:, :states, :D], 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _scan(
    inputs: Inputs, A_ND: Array, skip_1D: Array, start_BND: Array, mark_B1T: Array, options: Options
) -> tuple[Array, Array]:
    """(y, final state) of whole blocks, float32."""
    y, final = _forward_call(inputs, A_ND, skip_1D, start_BND, mark_B1T, options, keep_borders=False)
    return y, final


def _forward(
    inputs: Inputs, A_ND: Array, skip_1D: Array, start_BND: Array, mark_B1T: Array, options: Options
) -> tuple[tuple[Array, Array], Any]:
    y, final, borders_BJND = _forward_call(inputs, A_ND, skip_1D, start_BND, mark_B1T, options, keep_borders=True)
    return (y, final), (inputs, A_ND, skip_1D, mark_B1T, borders_BJND)


def _forward_call(
    inputs: Inputs, A_ND: Array, skip_1D: Array, start_BND: Array, mark_B1T: Array, options: Options, *, keep_borders: bool
) -> Any:
    (batch, T, D), N, width = inputs[0].shape, A_ND.shape[0], options.width
    specs = _specs(T, N, width, from_last=False)
    shapes = {
        "row": jax.ShapeDtypeStruct((batch, T, D), jnp.float32),
        "state": jax.ShapeDtypeStruct((batch, N, D), jnp.float32),
        "border": jax.ShapeDtypeStruct((batch, T // TOKENS, N, D), jnp.float32),
    }
    outputs = list(shapes) if keep_borders else list(shapes)[:2]
    return pl.pallas_call(
        _forward_kernel,
        grid=(batch, D // width, T // TOKENS),
        in_specs=[specs[name] for name in ("row", "row", "column", "column", "A", "skip", "state", "mark")],
        out_specs=[specs[name] for name in outputs],
        out_shape=[shapes[name] for name in outputs],
        scratch_shapes=[tpu.VMEM((N, width), jnp.float32)],
        interpret=options.interpret,
        compiler_params=pallas.tpu_params(dimension_semantics=("parallel", "parallel", "arbitrary")),
        name="selective_scan_forward",
    )(*inputs, A_ND, skip_1D, start_BND, mark_B1T)


def _backward(options: Options, saved: Any, cts: tuple[Array, Array]) -> tuple[Any, ...]:
    inputs, A_ND, skip_1D, mark_B1T, borders_BJND = saved
    dy, behind_BND = cts
    (batch, T, D), N, width = inputs[0].shape, A_ND.shape[0], options.width
    specs = _specs(T, N, width, from_last=True)
    names = ("row", "row", "column", "column", "A", "skip", "state", "mark", "border", "row")
    float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    partial = float32((batch, D // width, N, T))
    dx, dstep, dB, dC, dA, dskip, dstart = pl.pallas_call(
        _backward_kernel,
        grid=(batch, D // width, T // TOKENS),
        in_specs=[specs[name] for name in names],
        out_specs=[specs[name] for name in ("row", "row", "partial", "partial", "state", "sum", "state")],
        out_shape=[
            *[float32((batch, T, D))] * 2,
            *[partial] * 2,
            float32((batch, N, D)),
            float32((batch, 1, D)),
            float32((batch, N, D)),
        ],
        scratch_shapes=[tpu.VMEM((N, width), jnp.float32), tpu.VMEM((TOKENS, N, width), jnp.float32)],
        interpret=options.interpret,
        compiler_params=pallas.tpu_params(dimension_semantics=("parallel", "parallel", "arbitrary")),
        name="selective_scan_backward",
    )(*inputs, A_ND, skip_1D, behind_BND, mark_B1T, borders_BJND, dy)
    return (dx, dstep, jnp.sum(dB, axis=1), jnp.sum(dC, axis=1)), jnp.sum(dA, axis=0), jnp.sum(dskip, axis=0), dstart, None


_scan.defvjp(_forward, _backward)


def _forward_kernel(x, step, B, C, A, skip, start, mark, y, final, *rest) -> None:
    """rest: the border's state, if it is kept, and the scratch state."""
    *border, state = rest

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        state[...] = start[...]

    if border:
        border[0][...] = state[...]
    A_NW, B_NT, C_NT, skip_1W = A[...], B[...], C[...], skip[...]

    def token(t: Any, h_NW: Array) -> Array:
        kind, row = mark[0, t], pl.ds(t, 1)
        x_1W = x[row, :]
        _, h_NW = _advance(kind, x_1W, step[row, :], _column(B_NT, t), A_NW, h_NW)
        y_1W = jnp.sum(h_NW * _column(C_NT, t), axis=0, keepdims=True) + skip_1W * x_1W
        y[row, :] = jnp.where(kind == PADDING, 0.0, y_1W)
        return h_NW

    state[...] = jax.lax.fori_loop(0, TOKENS, token, state[...], unroll=UNROLL)
    final[...] = state[...]


def _backward_kernel(
    x, step, B, C, A, skip, behind, mark, border, dy, dx, dstep, dB, dC, dA, dskip, dstart, state, before
) -> None:
    """With g_t the cotangent of h_t after all its uses, g_t = C_t dy_t + decay_{t+1} g_{t+1}; `state` is what follows."""

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        state[...] = behind[...]
        dA[...] = jnp.zeros(dA.shape, jnp.float32)
        dskip[...] = jnp.zeros(dskip.shape, jnp.float32)

    A_NW, B_NT, C_NT, skip_1W = A[...], B[...], C[...], skip[...]

    def again(t: Any, h_NW: Array) -> Array:
        before[t] = h_NW
        row = pl.ds(t, 1)
        return _advance(mark[0, t], x[row, :], step[row, :], _column(B_NT, t), A_NW, h_NW)[1]

    jax.lax.fori_loop(0, TOKENS, again, border[...], unroll=UNROLL)

    def back(i: Any, carry: Any) -> Any:
        behind_NW, dA_NW, dB_NT, dC_NT, dskip_1W = carry
        t = TOKENS - 1 - i
        kind, row = mark[0, t], pl.ds(t, 1)
        padding = kind == PADDING
        x_1W, step_1W = x[row, :], jnp.where(padding, 0.0, step[row, :])
        dy_1W = jnp.where(padding, 0.0, dy[row, :])
        B_N1, before_NW = _column(B_NT, t), before[t]
        decay_NW, h_NW = _advance(kind, x_1W, step_1W, B_N1, A_NW, before_NW)
        g_NW = _column(C_NT, t) * dy_1W + behind_NW
        kept_NW = decay_NW * g_NW
        dlog_NW = kept_NW * before_NW
        write_1W = jnp.sum(g_NW * B_N1, axis=0, keepdims=True)
        dx[row, :] = write_1W * step_1W + skip_1W * dy_1W
        dstep_1W = jnp.sum(dlog_NW * A_NW, axis=0, keepdims=True) + write_1W * x_1W
        dstep[row, :] = jnp.where(padding, 0.0, dstep_1W)
        dB_N1 = jnp.sum(g_NW * (step_1W * x_1W), axis=1, keepdims=True)
        dC_N1 = jnp.sum(h_NW * dy_1W, axis=1, keepdims=True)
        here = _lanes(B_NT) == t
        sums = (dA_NW + dlog_NW * step_1W, jnp.where(here, dB_N1, dB_NT), jnp.where(here, dC_N1, dC_NT))
        return kept_NW, *sums, dskip_1W + dy_1W * x_1W

    zero_NT = jnp.zeros(B.shape, jnp.float32)
    carry = (state[...], dA[...], zero_NT, zero_NT, dskip[...])
    state[...], dA[...], dB[...], dC[...], dskip[...] = jax.lax.fori_loop(0, TOKENS, back, carry, unroll=UNROLL)
    dstart[...] = state[...]


def _advance(kind: Any, x_1W: Array, step_1W: Array, B_N1: Array, A_NW: Array, h_NW: Array) -> tuple[Array, Array]:
    """(decay, state behind the token); padding is a step of zero, a document start a decay of zero."""
    step_1W = jnp.where(kind == PADDING, 0.0, step_1W)
    decay_NW = jnp.where(kind == START, 0.0, jnp.exp(step_1W * A_NW))
    return decay_NW, decay_NW * h_NW + B_N1 * (step_1W * x_1W)


def _lanes(tile_NT: Array) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, tile_NT.shape, 1)


def _column(tile_NT: Array, t: Any) -> Array:
    """(N, 1): column t of a tile. All other terms of the sum are zero, so it is exact."""
    return jnp.sum(jnp.where(_lanes(tile_NT) == t, tile_NT, 0.0), axis=1, keepdims=True)


def _specs(T: int, N: int, width: int, *, from_last: bool) -> dict[str, pl.BlockSpec]:
    """Blocks of a step of the grid (batch row, block of channels, block of tokens)."""
    blocks = T // TOKENS

    def at(i: Any) -> Any:
        return blocks - 1 - i if from_last else i

    return {
        "row": pl.BlockSpec((None, TOKENS, width), lambda b, d, i: (b, at(i), d)),
        "column": pl.BlockSpec((None, N, TOKENS), lambda b, d, i: (b, 0, at(i))),
        "A": pl.BlockSpec((N, width), lambda b, d, i: (0, d)),
        "skip": pl.BlockSpec((1, width), lambda b, d, i: (0, d)),
        "sum": pl.BlockSpec((None, 1, width), lambda b, d, i: (b, 0, d)),
        "state": pl.BlockSpec((None, N, width), lambda b, d, i: (b, 0, d)),
        "border": pl.BlockSpec((None, None, N, width), lambda b, d, i: (b, at(i), 0, d)),
        "partial": pl.BlockSpec((None, None, N, TOKENS), lambda b, d, i: (b, d, 0, at(i))),
        "mark": pl.BlockSpec((None, 1, TOKENS), lambda b, d, i: (b, 0, at(i)), memory_space=tpu.SMEM),
    }
