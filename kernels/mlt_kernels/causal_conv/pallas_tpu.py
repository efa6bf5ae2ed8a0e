"""TPU kernels (Pallas, Mosaic): a program has a block of tokens and channels in fast memory and reads it once for all taps.

The inputs stand as float32 behind the last ones of the block in front, or behind the halo, in one window: a tap reads the
window so many rows up. The backward kernel makes the activation's argument again instead of keeping it, takes the blocks
of a row from the last to the first, and holds what the first tokens of a block give to the block in front. The cotangents of
kernel and bias are summed block by block for each row of the batch, and one sum over rows follows: always the same order.
The last block may reach over the row's end, and over the last channel: nothing is padded or copied.

Status: numbers checked in interpret mode, programs compiled for TPUs v4 to v6e; not run on a TPU.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from mlt_kernels import pallas
from mlt_kernels.causal_conv._halo import extend, following
from mlt_kernels.diagonal_recurrence._march import padded

TOKENS, CHANNELS = 512, 512
"""Of a block: the backward kernel holds 6 MiB with float32 inputs, both buffers of each array included."""
ROWS, LANES = 64, 128
"""Of the tiles that a block is computed by: 8 registers a value, so those of four taps stay in registers."""
TILE = 16
"""Rows of a tile of 16-bit numbers: what stands in front of a block is so many rows, or a power of two times that."""
MOST_TAPS, MOST_CONTEXT = 16, 128

BACK, AHEAD = 0, 1
"""Which way a document goes on."""

Refs = dict[str, Any]


class Options(NamedTuple):
    """What is static in a call."""

    dilation: int
    activation: str | None
    length: int  # T
    tokens: int  # of a block
    width: int  # channels of a block
    front: int  # rows in front of a block
    interpret: bool


def unsupported(*, x: Array, kernel: Array, bias: Array | None, dilation: int, **_: Any) -> str | None:
    reason = pallas.unsupported_platform("tpu")
    if reason:
        return reason
    W = kernel.shape[0]
    if W > MOST_TAPS:
        return f"{W} taps; its kernels take up to {MOST_TAPS}"
    if (W - 1) * dilation > MOST_CONTEXT:
        return f"{W} taps with dilation={dilation}; its kernels look up to {MOST_CONTEXT} tokens back"
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"x is {x.dtype.name}; its kernels take float32 and bfloat16"
    if any(v is not None and v.dtype.itemsize > 4 for v in (kernel, bias)):
        return f"a {kernel.dtype.name} kernel; its kernels compute in float32"
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
    (B, T, D), context = x.shape, (kernel.shape[0] - 1) * dilation
    front = max(TILE, pl.next_power_of_2(context))
    tokens, width = min(TOKENS, padded(T, LANES)), min(CHANNELS, padded(D, LANES))
    options = Options(dilation, activation, T, tokens, width, front, pallas.interpreting())
    bias_1D = jnp.zeros((1, D), jnp.float32) if bias is None else bias.astype(jnp.float32)[None]
    halo_BFD = jnp.zeros((B, front, D), jnp.float32)
    if halo is not None:
        halo_BFD = jnp.pad(halo.astype(x.dtype).astype(jnp.float32), [(0, 0), (front - context, 0), (0, 0)])
    near_B2T = None if segment_ids is None else _near(segment_ids, context)
    y: Any = _conv(x, kernel.astype(jnp.float32), bias_1D, halo_BFD, near_B2T, options)
    if not return_halo:
        return y
    last = slice(max(T - context, 0), T)
    inputs, run_ = extend(x[:, last], None if segment_ids is None else segment_ids[:, last], halo, context)
    return y, following(inputs, run_, context)


def _near(segment_ids_BT: Array, context: int) -> Array:
    """(B, 2, T) int32: how many tokens, `context` at most, a token's document goes on backwards and forwards.

    The halo is of the first document, and tokens behind the row are of the last: they have no cotangent.
    """
    place = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
    changed = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    first = jnp.pad(jnp.where(changed, place[1:], -context), [(0, 0), (1, 0)], constant_values=-context)
    beyond = len(place) + context
    last = jnp.pad(jnp.where(changed, place[:-1], beyond), [(0, 0), (0, 1)], constant_values=beyond)
    back, ahead = place - jax.lax.cummax(first, axis=1), jax.lax.cummin(last, axis=1, reverse=True) - place
    return jnp.minimum(jnp.stack([back, ahead], axis=1), context)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _conv(x_BTD: Array, kernel_WD: Array, bias_1D: Array, halo_BFD: Array, near_B2T: Array | None, options: Options) -> Array:
    """y of inputs with `front` rows in front of them, the last of which are the halo."""
    return _forward(x_BTD, kernel_WD, bias_1D, halo_BFD, near_B2T, options)[0]


def _forward(
    x_BTD: Array, kernel_WD: Array, bias_1D: Array, halo_BFD: Array, near_B2T: Array | None, options: Options
) -> tuple[Array, Any]:
    saved = (x_BTD, kernel_WD, bias_1D, halo_BFD, near_B2T)
    (y,) = _call(_forward_kernel, options, saved, {}, {"y": jax.ShapeDtypeStruct(x_BTD.shape, x_BTD.dtype)})
    return y, saved


def _backward(options: Options, saved: Any, dy_BTD: Array) -> tuple[Any, ...]:
    x, kernel, bias, halo, _ = saved
    made = jax.ShapeDtypeStruct
    results = {
        "dx": made(x.shape, x.dtype),
        "dhalo": made(halo.shape, jnp.float32),
        "dkernel": made((len(x), *kernel.shape), jnp.float32),
        "dbias": made((len(x), *bias.shape), jnp.float32),
    }
    dx, dhalo, dkernel, dbias = _call(_backward_kernel, options, saved, {"dy": dy_BTD}, results)
    return dx, jnp.sum(dkernel, axis=0), jnp.sum(dbias, axis=0), dhalo, None


_conv.defvjp(_forward, _backward)


def _call(kernel: Callable[..., None], options: Options, saved: Any, more: dict[str, Array], results: dict[str, Any]) -> Any:
    """Programs are (row, block of channels, block of tokens); the backward kernel, which gets dy, goes from the last block on."""
    x, taps, bias, halo, near = saved
    (B, T, D), W, (tokens, width, front) = x.shape, len(taps), (options.tokens, options.width, options.front)
    blocks, backward = pl.cdiv(T, tokens), bool(more)
    arrays = {"x": x, "edge": x, "halo": halo, "kernel": taps, "bias": bias, **more}
    scratch = {"window": tpu.VMEM((front + tokens, width), jnp.float32)}
    if near is not None:
        arrays["near"] = near
        scratch["reach"] = tpu.VMEM((1 + backward, tokens, LANES), jnp.int32)
    if backward:
        scratch["owed"] = tpu.VMEM((front + tokens + front, width), jnp.float32)

    def at(i: Any) -> Any:
        return blocks - 1 - i if backward else i

    row = pl.BlockSpec((None, tokens, width), lambda b, d, i: (b, at(i), d))
    ends = pl.BlockSpec((None, front, width), lambda b, d, i: (b, 0, d))
    specs = {
        **dict.fromkeys(("x", "dy", "y", "dx"), row),
        "edge": pl.BlockSpec((None, front, width), lambda b, d, i: (b, jnp.maximum(at(i) * (tokens // front) - 1, 0), d)),
        **dict.fromkeys(("halo", "dhalo"), ends),
        "kernel": pl.BlockSpec((W, width), lambda b, d, i: (0, d)),
        "bias": pl.BlockSpec((1, width), lambda b, d, i: (0, d)),
        "near": pl.BlockSpec((None, 2, tokens), lambda b, d, i: (b, 0, at(i))),
        "dkernel": pl.BlockSpec((None, W, width), lambda b, d, i: (b, 0, d)),
        "dbias": pl.BlockSpec((None, 1, width), lambda b, d, i: (b, 0, d)),
    }
    names = (*arrays, *results, *scratch)

    def body(*refs: Any) -> None:
        kernel(dict(zip(names, refs, strict=True)), options, at(pl.program_id(2)))

    return pl.pallas_call(
        body,
        grid=(B, pl.cdiv(D, width), blocks),
        in_specs=[specs[name] for name in arrays],
        out_specs=[specs[name] for name in results],
        out_shape=list(results.values()),
        scratch_shapes=list(scratch.values()),
        interpret=options.interpret,
        compiler_params=pallas.tpu_params(dimension_semantics=("parallel", "parallel", "arbitrary" if backward else "parallel")),
        name=f"causal_conv{kernel.__name__.removesuffix('_kernel')}",
    )(*arrays.values())


def _forward_kernel(refs: Refs, options: Options, block: Any) -> None:
    y = refs["y"]
    _fill(refs, options, block)

    def tile(rows: pl.Slice, lanes: slice) -> None:
        out = _argument(refs, options, rows, lanes, _inputs(refs, options, rows, lanes))
        y[rows, lanes] = _activation(out, options.activation)[0].astype(y.dtype)

    _tiles(options, tile)


def _backward_kernel(refs: Refs, options: Options, block: Any) -> None:
    """`owed` has rows of zeros, the cotangents of the block's arguments, and those of the first arguments behind it."""
    owed, dx, dhalo, dkernel, dbias = (refs[name] for name in ("owed", "dx", "dhalo", "dkernel", "dbias"))
    W, front, behind = dkernel.shape[0], options.front, options.front + options.tokens
    _fill(refs, options, block)

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        for ref in (owed, dkernel, dbias):
            ref[...] = jnp.zeros(ref.shape, jnp.float32)

    @pl.when(pl.program_id(2) > 0)
    def _() -> None:
        owed[behind:, :] = owed[front : 2 * front, :]

    def arguments(rows: pl.Slice, lanes: slice) -> None:
        inputs = _inputs(refs, options, rows, lanes)
        slope = _activation(_argument(refs, options, rows, lanes, inputs), options.activation)[1]
        dout = _inside(options, block, rows, refs["dy"][rows, lanes].astype(jnp.float32) * slope)
        owed[_down(rows, front), lanes] = dout
        dbias[:, lanes] += jnp.sum(dout, axis=0, keepdims=True)
        for back, x in enumerate(inputs):
            w, product = W - 1 - back, _own(refs, options, BACK, rows, back, dout * x)
            dkernel[w : w + 1, lanes] += jnp.sum(product, axis=0, keepdims=True)

    def given(rows: pl.Slice, lanes: slice) -> None:
        later = (_load(owed, rows, front + back * options.dilation, lanes) for back in range(W))
        parts = (_own(refs, options, AHEAD, rows, back, _tap(refs, back, lanes) * dout) for back, dout in enumerate(later))
        dx[rows, lanes] = functools.reduce(jnp.add, parts).astype(dx.dtype)

    _tiles(options, arguments)
    _tiles(options, given)

    @pl.when(block == 0)
    def _() -> None:
        for lanes in _lanes(options):
            first = owed[front : 2 * front, lanes]
            if "reach" in refs:  # a document goes back further than to the row's start, or does not read the halo
                place = jax.lax.broadcasted_iota(jnp.int32, first.shape, 0)
                first = jnp.where(refs["reach"][BACK, :front, :] > place, first, 0.0)
            owed[front : 2 * front, lanes] = first
            later = (_load(owed, pl.ds(0, front), back * options.dilation, lanes) for back in range(W))
            dhalo[:, lanes] = functools.reduce(jnp.add, (_tap(refs, back, lanes) * dout for back, dout in enumerate(later)))


def _fill(refs: Refs, options: Options, block: Any) -> None:
    """The window, with zeros behind the row's end; and how far documents go on, a row of the tile for each token."""
    window, front = refs["window"], options.front
    window[:front, :] = jnp.where(block == 0, refs["halo"][...], refs["edge"][...].astype(jnp.float32))

    def tile(rows: pl.Slice, lanes: slice) -> None:
        window[_down(rows, front), lanes] = _inside(options, block, rows, refs["x"][rows, lanes].astype(jnp.float32))

    _tiles(options, tile)
    if "reach" in refs:
        for which in range(refs["reach"].shape[0]):
            for start in range(0, options.tokens, LANES):
                near = refs["near"][which : which + 1, start : start + LANES].astype(jnp.float32)
                refs["reach"][which, start : start + LANES, :] = jnp.broadcast_to(near, (LANES, LANES)).T.astype(jnp.int32)


def _tiles(options: Options, tile: Callable[[pl.Slice, slice], None]) -> None:
    def step(i: Any, _: None) -> None:
        for lanes in _lanes(options):
            tile(pl.ds(pl.multiple_of(i * ROWS, ROWS), ROWS), lanes)

    jax.lax.fori_loop(0, options.tokens // ROWS, step, None)


def _lanes(options: Options) -> list[slice]:
    return [slice(start, start + LANES) for start in range(0, options.width, LANES)]


def _down(rows: pl.Slice, by: int) -> pl.Slice:
    return pl.ds(rows.start + by, rows.size)


def _load(ref: Any, rows: pl.Slice, by: int, lanes: slice) -> Array:
    """The rows `by` further down. A load begins at the edge of a tile of 8 rows: one more tile comes along and all turn."""
    past = by % 8
    if past == 0:
        return ref[_down(rows, by), lanes]
    length = rows.size + 8
    return tpu.roll(ref[pl.ds(rows.start + by - past, length), lanes], length - past, 0)[: rows.size]


def _inside(options: Options, block: Any, rows: pl.Slice, value: Array) -> Array:
    """0 behind the row's end, where a block holds whatever was in memory."""
    if options.length % options.tokens == 0:
        return value
    place = jax.lax.broadcasted_iota(jnp.int32, value.shape, 0)
    return jnp.where(block * options.tokens + rows.start + place < options.length, value, 0.0)


def _own(refs: Refs, options: Options, which: int, rows: pl.Slice, taps: int, value: Array) -> Array:
    """`value` where the document goes on for so many taps, else 0."""
    if taps == 0 or "reach" not in refs:
        return value
    return jnp.where(refs["reach"][which, rows, :] >= taps * options.dilation, value, 0.0)


def _inputs(refs: Refs, options: Options, rows: pl.Slice, lanes: slice) -> list[Array]:
    """What stands 0, 1, ... taps back."""
    taps = range(refs["kernel"].shape[0])
    return [_load(refs["window"], rows, options.front - back * options.dilation, lanes) for back in taps]


def _tap(refs: Refs, back: int, lanes: slice) -> Array:
    w = refs["kernel"].shape[0] - 1 - back
    return refs["kernel"][w : w + 1, lanes]


def _argument(refs: Refs, options: Options, rows: pl.Slice, lanes: slice, inputs: list[Array]) -> Array:
    out = refs["bias"][:, lanes]
    for back, x in enumerate(inputs):
        out = out + _own(refs, options, BACK, rows, back, _tap(refs, back, lanes) * x)
    return out


def _activation(out: Array, name: str | None) -> tuple[Array, Array | float]:
    """(value, derivative)."""
    if name is None:
        return out, 1.0
    gate = jax.nn.sigmoid(out)
    return out * gate, gate * (1.0 + out * (1.0 - gate))
