"""GPU kernels (Pallas, Triton): a program owns a few channels of a piece of a row and walks along its tokens.

The inputs under the taps are a window in registers, so each array is read and written once: x and y forward; x, the
cotangents of y and of x backward, where the activation's argument is made again instead of kept. Each piece sums the
cotangents of kernel and bias for itself, and one sum over pieces follows, in a fixed order. A halo touches the first
tokens alone: these few are computed by the portable form. Dilated taps have no kernel.

Status: numbers checked in interpret mode, programs lowered and compiled for an H200; not run on a GPU.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from mlt_kernels import pallas, tuned
from mlt_kernels.causal_conv import chunked
from mlt_kernels.causal_conv._halo import extend, following
from mlt_kernels.diagonal_recurrence._march import march, pad, padded

GROUP = 8
"""Tokens loaded at once."""
PIECE = 256
"""Tokens of a piece; the backward walk repeats W - 1 more."""
CHANNELS = {2: 64, 4: 32}
"""Channels of a program by the bytes of a number: 128 bytes of a token are one load of a warp."""
WIDTHS = (2, 8)
"""Fewest and most taps: the window of inputs lives in registers."""


class Options(NamedTuple):
    """What is static in a call."""

    activation: str | None
    piece: int
    width: int
    interpret: bool


def unsupported(*, x: Array, kernel: Array, bias: Array | None, dilation: int, **_: Any) -> str | None:
    reason = pallas.unsupported_platform("gpu")
    if reason:
        return reason
    W, (least, most) = kernel.shape[0], WIDTHS
    if not least <= W <= most:
        return f"{W} taps; its kernels take {least} to {most}"
    if dilation != 1:
        return f"dilation={dilation}; its kernels take neighbouring tokens"
    if any(v is not None and v.dtype.itemsize not in CHANNELS for v in (x, kernel, bias)):
        return f"{x.dtype.name} inputs with a {kernel.dtype.name} kernel; its kernels compute in float32"
    return f"x has shape {x.shape}: nothing to compute" if 0 in x.shape else None


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
    (_, T, D), context = x.shape, kernel.shape[0] - 1
    rule = {"tokens": PIECE, "channels": CHANNELS[x.dtype.itemsize]}
    shape = {"item_bytes": x.dtype.itemsize, "taps": kernel.shape[0]}
    most, widest = tuned.sizes("causal_conv", "pallas_gpu", "walk", shape, rule).values()
    width, piece = min(widest, pl.next_power_of_2(D)), min(most, padded(T, GROUP))
    tokens, channels = padded(T, piece), padded(D, width)
    options = Options(activation, piece, width, pallas.interpreting())
    kernel_WD = pad(kernel.astype(jnp.float32), {1: channels})
    bias_D = pad(jnp.zeros((D,), jnp.float32) if bias is None else bias.astype(jnp.float32), {0: channels})
    reach_BT = pad(_reach(x, segment_ids, context), {1: tokens})
    y: Any = _conv(pad(x, {1: tokens, 2: channels}), kernel_WD, bias_D, reach_BT, options)
    y = y[:, :T, :D]
    if halo is not None:
        few = slice(0, min(context, T))
        first = chunked.run(
            x=x[:, few],
            kernel=kernel,
            bias=bias,
            activation=activation,
            dilation=1,
            segment_ids=None if segment_ids is None else segment_ids[:, few],
            halo=halo,
            return_halo=False,
        )
        y = y.at[:, few].set(first)
    if not return_halo:
        return y
    last = slice(max(T - context, 0), T)
    inputs, run_ = extend(x[:, last], None if segment_ids is None else segment_ids[:, last], halo, context)
    return y, following(inputs, run_, context)


def _reach(x: Array, segment_ids: Array | None, context: int) -> Array:
    """(B, T) int32: how many tokens back, `context` at most, the document of a token goes on."""
    shape = x.shape[:2]
    if segment_ids is None:
        return jnp.broadcast_to(jnp.minimum(jnp.arange(shape[1], dtype=jnp.int32), context), shape)
    same = jnp.pad(segment_ids[:, 1:] == segment_ids[:, :-1], [(0, 0), (1, 0)])
    reach, goes_on = jnp.zeros(shape, jnp.int32), jnp.ones(shape, bool)
    for back in range(context):
        goes_on = goes_on & jnp.pad(same, [(0, 0), (back, 0)])[:, : shape[1]]
        reach = reach + goes_on
    return reach


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _conv(x_BTD: Array, kernel_WD: Array, bias_D: Array, reach_BT: Array, options: Options) -> Array:
    """y of whole pieces and blocks, without a halo."""
    return _forward(x_BTD, kernel_WD, bias_D, reach_BT, options)[0]


def _forward(x_BTD: Array, kernel_WD: Array, bias_D: Array, reach_BT: Array, options: Options) -> tuple[Array, Any]:
    y = _call(_forward_kernel, options, (x_BTD,), kernel_WD, bias_D, reach_BT, partial=False)
    return y[0], (x_BTD, kernel_WD, bias_D, reach_BT)


def _backward(options: Options, saved: Any, dy_BTD: Array) -> tuple[Any, ...]:
    x_BTD, kernel_WD, bias_D, reach_BT = saved
    dx, dkernel, dbias = _call(_backward_kernel, options, (x_BTD, dy_BTD), kernel_WD, bias_D, reach_BT, partial=True)
    return dx, jnp.sum(dkernel, axis=(0, 1)), jnp.sum(dbias, axis=(0, 1)), None


_conv.defvjp(_forward, _backward)


def _call(
    kernel: Any, options: Options, rows: tuple[Array, ...], kernel_WD: Array, bias_D: Array, reach_BT: Array, *, partial: bool
) -> Any:
    (B, T, D), W, width = rows[0].shape, kernel_WD.shape[0], options.width
    pieces = T // options.piece
    row = pl.BlockSpec((None, T, width), lambda b, p, d: (b, 0, d))
    out_specs, out_shape = [row], [jax.ShapeDtypeStruct(rows[0].shape, rows[0].dtype)]
    if partial:
        out_specs += [
            pl.BlockSpec((None, None, W, width), lambda b, p, d: (b, p, 0, d)),
            pl.BlockSpec((None, None, width), lambda b, p, d: (b, p, d)),
        ]
        out_shape += [
            jax.ShapeDtypeStruct((B, pieces, W, D), jnp.float32),
            jax.ShapeDtypeStruct((B, pieces, D), jnp.float32),
        ]
    return pl.pallas_call(
        functools.partial(kernel, options=options),
        grid=(B, pieces, D // width),
        in_specs=[
            *[row] * len(rows),
            pl.BlockSpec((W, width), lambda b, p, d: (0, d)),
            pl.BlockSpec((width,), lambda b, p, d: (d,)),
            pl.BlockSpec((None, T), lambda b, p, d: (b, 0)),
        ],
        out_specs=out_specs,
        out_shape=out_shape,
        interpret=options.interpret,
        compiler_params=pallas.triton_params(num_warps=1, num_stages=1),
        name="causal_conv",
    )(*rows, kernel_WD, bias_D, reach_BT)


def _forward_kernel(x, kernel, bias, reach, y, *, options: Options) -> None:
    W, first = kernel.shape[0], pl.program_id(1) * options.piece
    taps, bias_D = [kernel[W - 1 - back, :] for back in range(W)], bias[...]

    def step(t: Any, loaded: Any, window: tuple[Array, ...]) -> tuple[Array, ...]:
        """`window` holds the inputs 1, 2, ... tokens back."""
        reach_t, x_D = loaded
        inputs = (x_D, *window)
        out = _sum(reach_t, taps, inputs, bias_D)
        y[t, :] = _activation(out, options.activation)[0].astype(y.dtype)
        return inputs[:-1]

    window = tuple(_wide(x, jnp.maximum(first - back, 0)) for back in range(1, W))
    march(options.piece, GROUP, lambda t: (reach[t], _wide(x, t)), step, window, first=first)


def _backward_kernel(x, dy, kernel, bias, reach, dx, dkernel, dbias, *, options: Options) -> None:
    """From the last token back. The tokens behind the piece come first: they give to the inputs of the piece."""
    W, tokens, first = kernel.shape[0], reach.shape[0], pl.program_id(1) * options.piece
    behind = first + options.piece
    taps, bias_D = [kernel[W - 1 - back, :] for back in range(W)], bias[...]

    def given(reach_t: Any, dy_D: Array, inputs: tuple[Array, ...]) -> Array:
        """Cotangent of the activation's argument."""
        return dy_D * _activation(_sum(reach_t, taps, inputs, bias_D), options.activation)[1]

    def spread(reach_t: Any, dout_D: Array, owed: tuple[Array, ...]) -> tuple[Array, ...]:
        """`owed` to the inputs 0, 1, ... tokens back, with what this token adds."""
        added = (tap * dout_D if back == 0 else jnp.where(reach_t >= back, tap * dout_D, 0.0) for back, tap in enumerate(taps))
        return tuple(old + new for old, new in zip(owed, added, strict=True))

    nothing = jnp.zeros_like(bias_D)
    owed = (nothing,) * W
    inputs = tuple(_wide(x, jnp.clip(behind + W - 2 - back, 0, tokens - 1)) for back in range(W))
    for ahead in reversed(range(W - 1)):
        t = jnp.minimum(behind + ahead, tokens - 1)
        dout_D = jnp.where(behind + ahead < tokens, given(reach[t], _wide(dy, t), inputs), 0.0)
        owed = (*spread(reach[t], dout_D, owed)[1:], nothing)
        inputs = (*inputs[1:], _wide(x, jnp.clip(behind + ahead - W, 0, tokens - 1)))

    def load(t: Any) -> Any:
        return reach[t], _wide(dy, t), _wide(x, jnp.maximum(t - W, 0))

    def step(t: Any, loaded: Any, carry: Any) -> Any:
        inputs, owed, dtaps, dbias_D = carry
        reach_t, dy_D, next_D = loaded
        dout_D = given(reach_t, dy_D, inputs)
        owed = spread(reach_t, dout_D, owed)
        dx[t, :] = owed[0].astype(dx.dtype)
        products = (jnp.where(reach_t >= back, dout_D * x_D, 0.0) for back, x_D in enumerate(inputs))
        dtaps = tuple(old + new for old, new in zip(dtaps, products, strict=True))
        return (*inputs[1:], next_D), (*owed[1:], nothing), dtaps, dbias_D + dout_D

    carry = (inputs, owed, (nothing,) * W, nothing)
    _, _, dtaps, dbias[...] = march(options.piece, GROUP, load, step, carry, first=first, reverse=True)
    for back, dtap in enumerate(dtaps):
        dkernel[W - 1 - back, :] = dtap


def _sum(reach_t: Any, taps: list[Array], inputs: tuple[Array, ...], bias_D: Array) -> Array:
    """The activation's argument; an input of another document is selected away."""
    out = bias_D + taps[0] * inputs[0]
    for back in range(1, len(taps)):
        out = out + jnp.where(reach_t >= back, taps[back] * inputs[back], 0.0)
    return out


def _activation(out: Array, name: str | None) -> tuple[Array, Array | float]:
    """(value, derivative)."""
    if name is None:
        return out, 1.0
    gate = jax.nn.sigmoid(out)
    return out * gate, gate * (1.0 + out * (1.0 - gate))


def _wide(ref: Any, t: Any) -> Array:
    return ref[t, :].astype(jnp.float32)
