"""GPU kernels in Triton, called through jax-triton: tiles of tokens and channels, all of them side by side.

Each array is read and written once (taps are loads of the same tile, shifted): x and y forward; x, the cotangents of y and
of x backward, where the activation's argument is made again instead of kept. Rows of any length and width, dilated taps and
the halo are masks of the loads: nothing is padded or copied. Programs sum the cotangents of kernel and bias over their own
tokens, and one sum over programs follows, in a fixed order.

Status: numbers checked in Triton's interpreter, programs lowered and compiled for sm_90; not run on a GPU.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mlt_kernels import triton_calls, tuned
from mlt_kernels.causal_conv._halo import extend, following
from mlt_kernels.grids import unsupported_shape

KERNELS = "causal_conv._triton_kernels"
TOKENS, CHANNELS, WARPS = 64, 64, 4
"""A forward tile: 32 numbers a thread. A backward program, which holds several at once, has half the channels."""
TILES = 4
"""Tiles of one backward program: fewer partial sums of the kernel's cotangent."""
MOST_TAPS, MOST_CONTEXT = 16, 64
"""Taps are unrolled; and a backward tile must be longer than the context that it repeats."""


class Options(NamedTuple):
    """What is static in a call."""

    dilation: int
    activation: str | None
    interpret: bool


def unsupported(*, x: Array, kernel: Array, bias: Array | None, dilation: int, **_: Any) -> str | None:
    reason = triton_calls.unsupported()
    if reason:
        return reason
    W = kernel.shape[0]
    if W > MOST_TAPS:
        return f"{W} taps; its kernels take up to {MOST_TAPS}"
    if (W - 1) * dilation > MOST_CONTEXT:
        return f"{W} taps with dilation={dilation}; its kernels look up to {MOST_CONTEXT} tokens back"
    if any(v is not None and v.dtype.itemsize not in (2, 4) for v in (x, kernel, bias)):
        return f"{x.dtype.name} inputs with a {kernel.dtype.name} kernel; its kernels compute in float32"
    return unsupported_shape("x", x.shape)


def run(
    *,
    x: Array,
    kernel: Array,
    bias: Array | None,
    activation: str | None,
    dilation: int,
    segment_ids: Array | None,
    halo: Array | None,
    return_halo: bool,
) -> Any:
    T, context = x.shape[1], (kernel.shape[0] - 1) * dilation
    front = None if halo is None or context == 0 else halo.astype(x.dtype)
    first_BT = None if segment_ids is None else _first(segment_ids, 0 if front is None else -context)
    options = Options(dilation, activation, triton_calls.interpreting())
    wide = jnp.float32
    y: Any = _conv(x, kernel.astype(wide), None if bias is None else bias.astype(wide), front, first_BT, options)
    if not return_halo:
        return y
    last = slice(max(T - context, 0), T)
    inputs, run_ = extend(x[:, last], None if segment_ids is None else segment_ids[:, last], halo, context)
    return y, following(inputs, run_, context)


def _first(segment_ids_BT: Array, before: int) -> Array:
    """(B, T) int32: place of the first token of each token's run of ids, padding's too; `before` in the first run."""
    changed_BT = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    place = jnp.arange(1, segment_ids_BT.shape[1], dtype=jnp.int32)
    starts_BT = jnp.pad(jnp.where(changed_BT, place, before), [(0, 0), (1, 0)], constant_values=before)
    return jax.lax.cummax(starts_BT, axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _conv(
    x_BTD: Array, kernel_WD: Array, bias_D: Array | None, halo_BLD: Array | None, first_BT: Array | None, options: Options
) -> Array:
    return _forward(x_BTD, kernel_WD, bias_D, halo_BLD, first_BT, options)[0]


def _forward(x: Array, kernel: Array, bias: Array | None, halo: Array | None, first: Array | None, options: Options) -> Any:
    (B, T, D), saved = x.shape, (x, kernel, bias, halo, first)
    rule = {"tokens": TOKENS, "channels": CHANNELS, "warps": WARPS}
    tokens, channels, warps = tuned.sizes("causal_conv", "triton_gpu", "forward", _shape(x, kernel, options), rule).values()
    (y,) = triton_calls.call(
        f"{KERNELS}:forward",
        [x, *_arrays(*saved[1:]), T],
        [jax.ShapeDtypeStruct(x.shape, x.dtype)],
        grid=(_blocks(T, tokens), _blocks(D, channels), B),
        warps=warps,
        TOKENS=tokens,
        CHANNELS=channels,
        **_static(*saved, options),
    )
    return y, saved


def _backward(options: Options, saved: Any, dy: Array) -> tuple[Any, ...]:
    x, kernel, bias, halo, _ = saved
    (B, T, D), W = x.shape, kernel.shape[0]
    context = (W - 1) * options.dilation
    tokens, channels = (TOKENS, CHANNELS // 2) if context <= TOKENS // 4 else (4 * TOKENS, CHANNELS // 8)
    rule = {"channels": channels, "warps": WARPS}
    channels, warps = tuned.sizes("causal_conv", "triton_gpu", "backward", _shape(x, kernel, options), rule).values()
    pieces = _blocks(T + (0 if halo is None else context), TILES * (tokens - context))
    with triton_calls.interpret(options.interpret):
        dx, dhalo, dkernel, dbias = triton_calls.call(
            f"{KERNELS}:backward",
            [x, dy, *_arrays(*saved[1:]), T],
            [
                jax.ShapeDtypeStruct(x.shape, x.dtype),
                jax.ShapeDtypeStruct((1,) if halo is None else halo.shape, x.dtype),
                jax.ShapeDtypeStruct((B, pieces, W, D), jnp.float32),
                jax.ShapeDtypeStruct((B, pieces, D), jnp.float32),
            ],
            grid=(pieces, _blocks(D, channels), B),
            warps=warps,
            TOKENS=tokens,
            CHANNELS=channels,
            TAPS=1 << (W - 1).bit_length(),
            TILES=TILES,
            **_static(*saved, options),
        )
    dbias = None if bias is None else jnp.sum(dbias, axis=(0, 1))
    return dx, jnp.sum(dkernel, axis=(0, 1)), dbias, None if halo is None else dhalo, None


_conv.defvjp(_forward, _backward)


def _arrays(kernel: Array, bias: Array | None, halo: Array | None, first: Array | None) -> list[Array]:
    nothing = triton_calls.nothing()
    return [kernel, *(nothing if x is None else x for x in (bias, first, halo))]


def _static(
    x: Array, kernel: Array, bias: Array | None, halo: Array | None, first: Array | None, options: Options
) -> dict[str, Any]:
    return {
        "D": x.shape[2],
        "W": kernel.shape[0],
        "DILATION": options.dilation,
        "SILU": options.activation == "silu",
        "HAS_BIAS": bias is not None,
        "HAS_SEGMENTS": first is not None,
        "HAS_HALO": halo is not None,
    }


def _shape(x: Array, kernel: Array, options: Options) -> tuned.Shape:
    taps = kernel.shape[0]
    return {"context": (taps - 1) * options.dilation, "item_bytes": x.dtype.itemsize, "taps": taps}


def _blocks(size: int, block: int) -> int:
    return -(-size // block)
