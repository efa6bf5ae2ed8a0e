"""GPU kernels in Triton, called through jax-triton: one warp owns a few channels of a row and walks along it.

The same walks as `pallas_gpu`: the forward one keeps the state in front of every chunk of tokens; the backward one runs a
chunk again from there, leaves the state in front of every two tokens in a scratch array that stays in the cache, then makes
the states of these two again in registers and walks back over them. A decay is computed once forward and twice backward, and no
array holds a state for every token. Cotangents of B and C come as one sum a block of channels and are added up afterwards.
Arrays of any length and width are read as they are.

Status: numbers checked in Triton's interpreter, programs lowered and compiled for sm_90; not run on a GPU.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mlt_kernels import triton_calls, tuned
from mlt_kernels.diagonal_recurrence._march import marks
from mlt_kernels.grids import unsupported_shape

KERNELS = "selective_scan._triton_kernels"
CHUNK, GROUP = 64, 2
"""Tokens from one kept state to the next, and from one in the scratch array to the next: with four, 110 registers spill."""
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
    reason = triton_calls.unsupported()
    if reason:
        return reason
    if jnp.dtype(state_dtype) != jnp.float32:
        return f"states of {jnp.dtype(state_dtype).name}; its kernels compute in float32"
    if A.shape[1] > max(CHANNELS):
        return f"{A.shape[1]} states a channel; its kernels hold at most {max(CHANNELS)}"
    return unsupported_shape("x", x.shape)


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
    (batch, T, D), N = x.shape, A.shape[1]
    most = next(width for limit, width in CHANNELS.items() if limit >= N)
    rules = {"forward": most, "backward": min(most, BACKWARD_CHANNELS)}
    found = (tuned.sizes("selective_scan", "triton_gpu", name, {"states": N}, {"channels": n}) for name, n in rules.items())
    forward, backward = (min(at["channels"], _power(D)) for at in found)
    options = Options(forward, backward, triton_calls.interpreting())
    start_BDN = jnp.zeros((batch, D, N), state_dtype) if initial_state is None else initial_state.astype(state_dtype)
    skip_D = jnp.zeros((D,), state_dtype) if skip is None else skip.astype(state_dtype)
    mark_BT = None if segment_ids is None else marks(segment_ids, (batch, T), T)
    return _scan((x, step, B, C), A.astype(state_dtype), skip_D, start_BDN, mark_BT, options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _scan(inputs: Inputs, A_DN: Array, skip_D: Array, start_BDN: Array, mark_BT: Any, options: Options) -> tuple[Array, Array]:
    """(y in the type of x, final state in float32)."""
    y, final, _ = _forward_call(inputs, A_DN, skip_D, start_BDN, mark_BT, options, keep_borders=False)
    return y, final


def _forward(
    inputs: Inputs, A_DN: Array, skip_D: Array, start_BDN: Array, mark_BT: Any, options: Options
) -> tuple[tuple[Array, Array], Any]:
    y, final, borders_BJND = _forward_call(inputs, A_DN, skip_D, start_BDN, mark_BT, options, keep_borders=True)
    return (y, final), (inputs, A_DN, skip_D, mark_BT, borders_BJND)


def _forward_call(
    inputs: Inputs, A_DN: Array, skip_D: Array, start_BDN: Array, mark_BT: Any, options: Options, *, keep_borders: bool
) -> list[Array]:
    (batch, T, D), N, width = inputs[0].shape, A_DN.shape[1], options.forward_width
    borders = (batch, -(-T // CHUNK), N, D) if keep_borders else (1,)
    return triton_calls.call(
        f"{KERNELS}:forward",
        [*inputs, A_DN, skip_D, start_BDN, triton_calls.nothing() if mark_BT is None else mark_BT, T],
        [jax.ShapeDtypeStruct((batch, T, D), inputs[0].dtype), _float32(batch, D, N), _float32(*borders)],
        grid=(-(-D // width), batch),
        warps=1,
        KEEP=keep_borders,
        **_constants(D, N, width, mark_BT),
    )


def _backward(options: Options, saved: Any, cts: tuple[Array, Array]) -> tuple[Any, ...]:
    inputs, A_DN, skip_D, mark_BT, borders_BJND = saved
    dy, behind_BDN = cts
    x, step, B, C = inputs
    (batch, T, D), N, width = x.shape, A_DN.shape[1], options.backward_width
    blocks = -(-D // width)
    outputs = [
        *(jax.ShapeDtypeStruct(v.shape, v.dtype) for v in (x, step)),
        *[_float32(batch, blocks, T, N)] * 2,
        *(_float32(batch, D, N), _float32(batch, D), _float32(batch, D, N)),
        _float32(batch, blocks, CHUNK // GROUP, _power(N), width),
    ]
    with triton_calls.interpret(options.interpret):
        dx, dstep, dB, dC, dA, dskip, dstart, _ = triton_calls.call(
            f"{KERNELS}:backward",
            [
                *(*inputs, A_DN, skip_D, behind_BDN),
                *(triton_calls.nothing() if mark_BT is None else mark_BT, borders_BJND, dy, T),
            ],
            outputs,
            grid=(blocks, batch),
            warps=1,
            **_constants(D, N, width, mark_BT),
        )
    dinputs = (dx, dstep, jnp.sum(dB, axis=1).astype(B.dtype), jnp.sum(dC, axis=1).astype(C.dtype))
    return dinputs, jnp.sum(dA, axis=0), jnp.sum(dskip, axis=0), dstart, None


_scan.defvjp(_forward, _backward)


def _constants(D: int, N: int, width: int, mark_BT: Any) -> dict[str, Any]:
    return {"D": D, "N": N, "CHUNK": CHUNK, "W": width, "STATES": _power(N), "HAS_MARKS": mark_BT is not None}


def _power(size: int) -> int:
    """The least power of two that is not less."""
    return 1 << (size - 1).bit_length()


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
