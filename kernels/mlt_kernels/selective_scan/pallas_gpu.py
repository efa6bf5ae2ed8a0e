"""GPU kernels (Pallas, Triton): one warp owns a few channels of a row, all their states in registers, and walks along.

Arrays stay token-major. A state tile is (N, W) for W channels, so that a thread holds every state of its channels and the
sum over states stays inside it. The forward walk keeps the state in front of every chunk of tokens. The backward walk
goes over chunks from the last: it runs a chunk again, leaving the state in front of every few tokens in a scratch array
of its own that stays in the cache, then makes the states of these few tokens again in registers and walks back over them.
So a decay is computed once forward and twice backward, and no array holds a state for every token. Sums over channels
(cotangents of B and C) are partial, one for each block of channels, and added up afterwards in a fixed order.

Status: numbers checked in interpret mode, programs lowered and compiled for an H200; not run on a GPU.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from mlt_kernels import pallas, tuned
from mlt_kernels.diagonal_recurrence._march import PADDING, START, march, marks, pad, padded

CHUNK = 64
"""Tokens from one kept state to the next."""
AHEAD = 2
"""Tokens loaded at once in the forward walk."""
GROUP = 4
"""Tokens whose states the backward walk holds in registers."""
CHANNELS = {16: 64, 32: 32, 64: 16}
"""Channels of a program for at most so many states each: a tile of at most 1024 states, 32 for each thread of a warp."""
BACKWARD_CHANNELS = 32
"""The most channels of a program in the backward walk, which holds several tiles."""


class Options(NamedTuple):
    """What is static in a call."""

    forward_width: int
    backward_width: int
    interpret: bool


Inputs = tuple[Array, Array, Array, Array]
"""x, step (B, T, D), B, C (B, T, N)."""


def unsupported(*, x: Array, A: Array, state_dtype: Any, **_: Any) -> str | None:
    reason = pallas.unsupported_platform("gpu")
    if reason:
        return reason
    if jnp.dtype(state_dtype) != jnp.float32:
        return f"states of {jnp.dtype(state_dtype).name}; its kernels compute in float32"
    if A.shape[1] > max(CHANNELS):
        return f"{A.shape[1]} states a channel; its kernels hold at most {max(CHANNELS)}"
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
    N = pl.next_power_of_2(states)
    most = next(width for limit, width in CHANNELS.items() if limit >= N)
    rules = {"forward": most, "backward": min(most, BACKWARD_CHANNELS)}
    found = (tuned.sizes("selective_scan", "pallas_gpu", name, {"states": N}, {"channels": n}) for name, n in rules.items())
    forward, backward = (min(at["channels"], pl.next_power_of_2(D)) for at in found)
    options = Options(forward, backward, pallas.interpreting())
    tokens, channels = padded(T, CHUNK), padded(D, max(forward, backward))
    start = jnp.zeros((batch, D, states), state_dtype) if initial_state is None else initial_state
    inputs = tuple(pad(v, {1: tokens, 2: size}) for v, size in ((x, channels), (step, channels), (B, N), (C, N)))
    A_ND = pad(A.astype(state_dtype).T, {0: N, 1: channels})
    skip_D = pad(jnp.zeros((D,), state_dtype) if skip is None else skip.astype(state_dtype), {0: channels})
    start_BND = pad(jnp.swapaxes(start.astype(state_dtype), 1, 2), {1: N, 2: channels})
    result: Any = _scan(inputs, A_ND, skip_D, start_BND, marks(segment_ids, (batch, T), tokens), options)
    y, final_BND = result
    return y[:, :T, :D], jnp.swapaxes(final_BND[:, :states, :D], 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _scan(inputs: Inputs, A_ND: Array, skip_D: Array, start_BND: Array, mark_BT: Array, options: Options) -> tuple[Array, Array]:
    """(y in the type of x, final state) of whole chunks and blocks."""
    return _forward_call(inputs, A_ND, skip_D, start_BND, mark_BT, options, keep_borders=False)[:2]


def _forward(
    inputs: Inputs, A_ND: Array, skip_D: Array, start_BND: Array, mark_BT: Array, options: Options
) -> tuple[tuple[Array, Array], Any]:
    y, final, borders_BJND = _forward_call(inputs, A_ND, skip_D, start_BND, mark_BT, options, keep_borders=True)
    return (y, final), (inputs, A_ND, skip_D, mark_BT, borders_BJND)


def _forward_call(
    inputs: Inputs, A_ND: Array, skip_D: Array, start_BND: Array, mark_BT: Array, options: Options, *, keep_borders: bool
) -> Any:
    (batch, T, D), N, width = inputs[0].shape, A_ND.shape[0], options.forward_width
    specs = _specs(T, N, width)
    shapes = {
        "row": jax.ShapeDtypeStruct((batch, T, D), inputs[0].dtype),
        "state": jax.ShapeDtypeStruct((batch, N, D), jnp.float32),
        "borders": jax.ShapeDtypeStruct((batch, T // CHUNK, N, D), jnp.float32),
    }
    outputs = list(shapes) if keep_borders else list(shapes)[:2]
    return pl.pallas_call(
        _forward_kernel,
        grid=(batch, D // width),
        in_specs=[specs[name] for name in ("row", "row", "states", "states", "A", "skip", "state", "mark")],
        out_specs=[specs[name] for name in outputs],
        out_shape=[shapes[name] for name in outputs],
        interpret=options.interpret,
        compiler_params=pallas.triton_params(num_warps=1, num_stages=1),
        name="selective_scan_forward",
    )(*inputs, A_ND, skip_D, start_BND, mark_BT)


def _backward(options: Options, saved: Any, cts: tuple[Array, Array]) -> tuple[Any, ...]:
    inputs, A_ND, skip_D, mark_BT, borders_BJND = saved
    dy, behind_BND = cts
    (batch, T, D), N, width = inputs[0].shape, A_ND.shape[0], options.backward_width
    blocks, specs = D // width, _specs(T, N, width)
    partial = pl.BlockSpec((None, None, T, N), lambda b, d: (b, d, 0, 0))
    float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    dx, dstep, dB, dC, dA, dskip, dstart, _ = pl.pallas_call(
        functools.partial(_backward_kernel, compiled=not options.interpret),
        grid=(batch, blocks),
        in_specs=[specs[name] for name in ("row", "row", "states", "states", "A", "skip", "state", "mark", "borders", "row")],
        out_specs=[
            *(specs["row"], specs["row"], partial, partial, specs["state"]),
            pl.BlockSpec((None, width), lambda b, d: (b, d)),
            specs["state"],
            pl.BlockSpec((None, None, CHUNK // GROUP, N, width), lambda b, d: (b, d, 0, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((batch, T, D), inputs[0].dtype),
            jax.ShapeDtypeStruct((batch, T, D), inputs[1].dtype),
            *[float32((batch, blocks, T, N))] * 2,
            float32((batch, N, D)),
            float32((batch, D)),
            float32((batch, N, D)),
            float32((batch, blocks, CHUNK // GROUP, N, width)),
        ],
        interpret=options.interpret,
        compiler_params=pallas.triton_params(num_warps=1, num_stages=1),
        name="selective_scan_backward",
    )(*inputs, A_ND, skip_D, behind_BND, mark_BT, borders_BJND, dy)
    dinputs = (dx, dstep, jnp.sum(dB, axis=1).astype(inputs[2].dtype), jnp.sum(dC, axis=1).astype(inputs[3].dtype))
    return dinputs, jnp.sum(dA, axis=0), jnp.sum(dskip, axis=0), dstart, None


_scan.defvjp(_forward, _backward)


def _forward_kernel(x, step, B, C, A, skip, start, mark, y, final, borders=None) -> None:
    A_NW, skip_W = A[...], skip[...]

    def load(t: Any) -> Any:
        return mark[t], _wide(x, t), _wide(step, t), _wide(B, t), _wide(C, t)

    def token(t: Any, loaded: Any, h_NW: Array) -> Array:
        kind, x_W, step_W, B_N, C_N = loaded
        _, h_NW = _advance((kind, x_W, step_W, B_N), A_NW, h_NW)
        y_W = jnp.sum(h_NW * C_N[:, None], axis=0) + skip_W * x_W
        y[t, :] = jnp.where(kind == PADDING, 0.0, y_W).astype(y.dtype)
        return h_NW

    def chunk(j: Array, h_NW: Array) -> Array:
        if borders is not None:
            borders[j, :, :] = h_NW
        return march(CHUNK, AHEAD, load, token, h_NW, first=j * CHUNK)

    final[...] = jax.lax.fori_loop(0, mark.shape[0] // CHUNK, chunk, start[...])


def _backward_kernel(
    x, step, B, C, A, skip, behind, mark, borders, dy, dx, dstep, dB, dC, dA, dskip, dstart, scratch, *, compiled
) -> None:
    """With g_t the cotangent of h_t after all its uses, g_t = C_t dy_t + decay_{t+1} g_{t+1}."""
    A_NW, skip_W = A[...], skip[...]
    chunks, groups = mark.shape[0] // CHUNK, CHUNK // GROUP

    def load(t: Any) -> Any:
        return mark[t], _wide(x, t), _wide(step, t), _wide(B, t)

    def back(entry: tuple[Any, Array, Array, Array], carry: Any) -> Any:
        t, decay_NW, before_NW, h_NW = entry
        behind_NW, dA_NW, dskip_W = carry
        kind, x_W, step_W, B_N = load(t)
        padding = kind == PADDING
        step_W = jnp.where(padding, 0.0, step_W)
        dy_W = jnp.where(padding, 0.0, _wide(dy, t))
        g_NW = _wide(C, t)[:, None] * dy_W[None] + behind_NW
        kept_NW = decay_NW * g_NW
        dlog_NW = kept_NW * before_NW
        write_W = jnp.sum(g_NW * B_N[:, None], axis=0)
        dx[t, :] = (write_W * step_W + skip_W * dy_W).astype(dx.dtype)
        dstep_W = jnp.sum(dlog_NW * A_NW, axis=0) + write_W * x_W
        dstep[t, :] = jnp.where(padding, 0.0, dstep_W).astype(dstep.dtype)
        dB[t, :] = jnp.sum(g_NW * (step_W * x_W)[None], axis=1)
        dC[t, :] = jnp.sum(h_NW * dy_W[None], axis=1)
        return kept_NW, dA_NW + dlog_NW * step_W[None], dskip_W + dy_W * x_W

    def chunk(i: Array, carry: Any) -> Any:
        first = (chunks - 1 - i) * CHUNK

        def again(s: Array, h_NW: Array) -> Array:
            scratch[s, :, :] = h_NW
            times = [first + s * GROUP + k for k in range(GROUP)]
            for loaded in [load(t) for t in times]:
                h_NW = _advance(loaded, A_NW, h_NW)[1]
            return h_NW

        def walk_back(i: Array, carry: Any) -> Any:
            s = groups - 1 - i
            h_NW, found = scratch[s, :, :], []
            for k in range(GROUP):
                t = first + s * GROUP + k
                before_NW = h_NW
                decay_NW, h_NW = _advance(load(t), A_NW, before_NW)
                found.append((t, decay_NW, before_NW, h_NW))
            for entry in reversed(found):
                carry = back(entry, carry)
            return carry

        jax.lax.fori_loop(0, groups, again, borders[chunks - 1 - i, :, :])
        # Threads read of `scratch` only what they wrote if both have the same layout; the barriers make it safe anyway.
        if compiled:
            triton.debug_barrier()
        carry = jax.lax.fori_loop(0, groups, walk_back, carry)
        if compiled:
            triton.debug_barrier()
        return carry

    start = (behind[...], jnp.zeros_like(A_NW), jnp.zeros_like(skip_W))
    dstart[...], dA[...], dskip[...] = jax.lax.fori_loop(0, chunks, chunk, start)


def _advance(loaded: tuple[Array, ...], A_NW: Array, h_NW: Array) -> tuple[Array, Array]:
    """(decay, state behind the token); padding is a step of zero, a document start a decay of zero."""
    kind, x_W, step_W, B_N = loaded
    step_W = jnp.where(kind == PADDING, 0.0, step_W)
    decay_NW = jnp.where(kind == START, 0.0, jnp.exp(step_W[None] * A_NW))
    return decay_NW, decay_NW * h_NW + B_N[:, None] * (step_W * x_W)[None]


def _wide(ref: Any, t: Any) -> Array:
    return ref[t, :].astype(jnp.float32)


def _specs(T: int, N: int, width: int) -> dict[str, pl.BlockSpec]:
    """Blocks of a program (batch row, block of channels)."""
    return {
        "row": pl.BlockSpec((None, T, width), lambda b, d: (b, 0, d)),
        "states": pl.BlockSpec((None, T, N), lambda b, d: (b, 0, 0)),
        "A": pl.BlockSpec((N, width), lambda b, d: (0, d)),
        "skip": pl.BlockSpec((width,), lambda b, d: (d,)),
        "state": pl.BlockSpec((None, N, width), lambda b, d: (b, 0, d)),
        "mark": pl.BlockSpec((None, T), lambda b, d: (b, 0)),
        "borders": pl.BlockSpec((None, T // CHUNK, N, width), lambda b, d: (b, 0, 0, d)),
    }
