"""The add rule with no decay or one decay a head, in Mosaic kernels for a TPU.

A TPU core runs the last dim of its grid in order, here the chunks, with a whole state in fast memory. Forward: one kernel.
Backward: `reads` walks forwards, recomputes the state and gives dq; `writes` walks backwards with the state's cotangent and
gives dk and dv. As on a GPU, `reads` leaves one chunk's entering state in 16 to `writes` if decays have gradients.

Arrays are laid out head by head, since blocks end in whole tiles; what belongs to a token and head travels as one of the 8
rows of a tile (8, C) a chunk.

Letters: B rows, T tokens, J chunks, C tokens of a chunk (i as query, j as key), H value heads, K key dim, V value dim.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from mlt_kernels import pallas
from mlt_kernels.linear_recurrence import _pallas_add_scalar
from mlt_kernels.linear_recurrence import _pallas_tools as tools
from mlt_kernels.linear_recurrence._pallas_tools import Arrays, Refs, Settings

ROWS = 8
COARSE, FINE, WRITE, FIRST, FIRST_END = range(5)
"""Rows of the tile that goes in: sums of log decays, write strengths, places of documents (as floats)."""
DIMS: tuple[Literal["parallel", "arbitrary"], ...] = ("parallel", "parallel", "arbitrary")


class Chunk(NamedTuple):
    """Decays and write strengths of one chunk, as columns (C, 1) where they scale rows of a tile."""

    pair: Array  # (C, C) from j to i, 0 where they do not meet
    into: Array  # (C, 1) from the chunk's start to i
    out: Array  # (C, 1) from j to the chunk's end
    kept: Array  # (1, 1) of the state that entered
    write: Array  # (C, 1)
    write_row: Array  # (1, C)


def _dot(a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    numbers = (((contract[0],), (contract[1],)), ((), ()))
    precision = tools.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=jnp.float32)


def _chunk(tile: Array) -> Chunk:
    C = tile.shape[1]
    columns = tile.T
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (C, C), n) for n in (0, 1))

    def row(n: int) -> Array:
        return tile[n : n + 1, :]

    def column(n: int) -> Array:
        return columns[:, n : n + 1]

    def last(n: int) -> Array:
        return tile[n : n + 1, C - 1 :]

    first, first_end = column(FIRST), last(FIRST_END)
    lower = (i >= j) & (first <= j.astype(jnp.float32))
    place = jax.lax.broadcasted_iota(jnp.int32, (C, 1), 0).astype(jnp.float32)
    pair = (column(COARSE) - row(COARSE)) + (column(FINE) - row(FINE))
    out = (last(COARSE) - column(COARSE)) + (last(FINE) - column(FINE))
    return Chunk(
        pair=jnp.exp(jnp.where(lower, pair, -jnp.inf)),
        into=jnp.exp(jnp.where(first < 0, column(COARSE) + column(FINE), -jnp.inf)),
        out=jnp.exp(jnp.where(place >= first_end, out, -jnp.inf)),
        kept=jnp.exp(jnp.where(first_end < 0, last(COARSE) + last(FINE), -jnp.inf)),
        write=column(WRITE),
        write_row=row(WRITE),
    )


def _row_sums(x: Array) -> Array:
    """(1, C): the sum of each row of x (C, D), as a row."""
    return _dot(jnp.ones((ROWS, x.shape[1]), jnp.float32), x, (1, 1))[:1, :]


def _start(refs: Refs, name: str, state: Any) -> None:
    """The scratch `state` before the first chunk of a row and head."""

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        state[...] = refs[name][...] if name in refs else jnp.zeros(state.shape, jnp.float32)


def _forward_kernel(refs: Refs, state: Any, *, scale: float, J: int, stride: int) -> None:
    _start(refs, "state", state)
    q, k, v, f = refs["q"][...], refs["k"][...], refs["v"][...], _chunk(refs["gates"][...])
    entering = state[...]
    if "states" in refs:

        @pl.when(pl.program_id(2) % stride == 0)
        def _() -> None:
            refs["states"][...] = entering

    scores = _dot(q, k, (1, 1)) * f.pair * f.write_row
    o = _dot(scores.astype(v.dtype), v) + _dot(q, entering.astype(q.dtype)) * f.into
    refs["o"][...] = (scale * o).astype(v.dtype)
    state[...] = f.kept * entering + _dot(k, (v * (f.write * f.out)).astype(k.dtype), (0, 0))
    if "final" in refs:

        @pl.when(pl.program_id(2) == J - 1)
        def _() -> None:
            refs["final"][...] = state[...]


def _reads_kernel(refs: Refs, state: Any, *, scale: float, J: int, stride: int) -> None:
    _start(refs, "state", state)
    q, k, v, do, f = refs["q"][...], refs["k"][...], refs["v"][...], refs["do"][...], _chunk(refs["gates"][...])
    entering = state[...]
    c = pl.program_id(2)
    if "anchors" in refs:

        @pl.when((c % stride == stride - 1) | (c == J - 1))
        def _() -> None:
            refs["anchors"][...] = entering

    d_scores = scale * _dot(do, v, (1, 1)) * f.pair * f.write_row
    inter = scale * _dot(do, entering.astype(do.dtype), (1, 1)) * f.into
    refs["dq"][...] = (_dot(d_scores.astype(k.dtype), k) + inter).astype(refs["dq"].dtype)
    state[...] = f.kept * entering + _dot(k, (v * (f.write * f.out)).astype(k.dtype), (0, 0))
    if "felt" in refs:
        i, t = (jax.lax.broadcasted_iota(jnp.int32, d_scores.shape, n) for n in (0, 1))
        weight = jnp.where(i > t, d_scores * _dot(q, k, (1, 1)), 0.0)
        earlier = _dot(weight, (i < t).astype(jnp.float32))
        refs["felt"][...] = jnp.zeros_like(refs["felt"])
        refs["felt"][0:1, :] = jnp.sum(jnp.where(i >= t, earlier, 0.0), axis=0, keepdims=True)
        refs["felt"][1:2, :] = _row_sums(q.astype(jnp.float32) * inter)


def _writes_kernel(refs: Refs, d_state: Any, *, scale: float, J: int, stride: int) -> None:
    _start(refs, "d_final", d_state)
    q, k, v, do, f = refs["q"][...], refs["k"][...], refs["v"][...], refs["do"][...], _chunk(refs["gates"][...])
    leaving = d_state[...]
    d_scores = scale * _dot(do, v, (1, 1)) * f.pair * f.write_row
    inter = _dot(v, leaving.astype(v.dtype), (1, 1)) * (f.write * f.out)
    refs["dk"][...] = (_dot(d_scores.astype(q.dtype), q, (0, 0)) + inter).astype(refs["dk"].dtype)
    scores = scale * _dot(q, k, (1, 1)) * f.pair
    d_write = _dot(scores.astype(do.dtype), do, (0, 0)) + _dot(k, leaving.astype(k.dtype)) * f.out
    refs["dv"][...] = (d_write * f.write).astype(refs["dv"].dtype)
    d_state[...] = f.kept * leaving + _dot(q, (do * (scale * f.into)).astype(q.dtype), (0, 0))
    c = J - 1 - pl.program_id(2)
    if "d_states" in refs:

        @pl.when(c % stride == 0)
        def _() -> None:
            d_state[...] += refs["d_states"][...]

    refs["felt"][...] = jnp.zeros_like(refs["felt"])
    refs["felt"][0:1, :] = _row_sums(v.astype(jnp.float32) * d_write)
    if "anchors" in refs:
        refs["felt"][1:2, :] = _row_sums(k.astype(jnp.float32) * inter)
        through = f.kept * jnp.sum(refs["anchors"][...] * leaving, keepdims=True)
        refs["felt"][2:3, :] = jnp.broadcast_to(through, (1, k.shape[0]))
    if "d_initial" in refs:

        @pl.when(c == 0)
        def _() -> None:
            refs["d_initial"][...] = d_state[...]


class Layout:
    """Blocks of arrays laid out (B, heads, T, dim); programs are (row, value head, chunk)."""

    def __init__(self, settings: Settings, arrays: Arrays, *, reverse: bool = False):
        self.B, self.T, self.H, self.V = arrays.v.shape
        self.Hk, self.K = arrays.q.shape[2:]
        self.C, self.J = settings.chunk, self.T // settings.chunk
        self.settings, self.reverse = settings, reverse

    def place(self, c: Any) -> Any:
        return self.J - 1 - c if self.reverse else c

    def tokens(self, heads: int, dim: int) -> pl.BlockSpec:
        group = self.H // heads
        return pl.BlockSpec((None, None, self.C, dim), lambda b, h, c: (b, h // group, self.place(c), 0))

    def tile(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, None, ROWS, self.C), lambda b, h, c: (b, h, self.place(c), 0, 0))

    def state(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, self.K, self.V), lambda b, h, c: (b, h, 0, 0))

    def states(self, stride: int) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        shape = jax.ShapeDtypeStruct((self.B, -(-self.J // stride), self.H, self.K, self.V), jnp.float32)
        block = (None, None, None, self.K, self.V)
        return shape, pl.BlockSpec(block, lambda b, h, c: (b, self.place(c) // stride, h, 0, 0))

    def felt(self) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        return jax.ShapeDtypeStruct((self.B, self.H, self.J, ROWS, self.C), jnp.float32), self.tile()

    def output(self, heads: int, dim: int, dtype: Any) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        return jax.ShapeDtypeStruct((self.B, heads, self.T, dim), dtype), self.tokens(heads, dim)

    def launch(self, kernel: Callable[..., None], inputs: dict[str, Any], outputs: dict[str, Any], stride: int) -> Any:
        names = [*inputs, *outputs]

        def body(*refs: Any) -> None:
            *arrays, state = refs
            by_name = dict(zip(names, arrays, strict=True))
            kernel(by_name, state, scale=self.settings.scale, J=self.J, stride=stride)

        body.__name__ = kernel.__name__.strip("_")
        results = pl.pallas_call(
            body,
            grid=(self.B, self.H, self.J),
            in_specs=[spec for _, spec in inputs.values()],
            out_specs=[spec for _, spec in outputs.values()],
            out_shape=[shape for shape, _ in outputs.values()],
            scratch_shapes=[tpu.VMEM((self.K, self.V), jnp.float32)],
            compiler_params=pallas.tpu_params(dimension_semantics=DIMS),
            interpret=pallas.interpreting(),
        )(*(array for array, _ in inputs.values()))
        return dict(zip(outputs, results, strict=True))


def _heads_first(x: Array) -> Array:
    return jnp.swapaxes(x, 1, 2)


def _gates(settings: Settings, arrays: Arrays, documents: tools.Documents | None, place: Array | None) -> Array:
    """(B, H, J, 8, C)."""
    B, T, H, _ = arrays.v.shape
    C = settings.chunk
    zero = jnp.zeros((B, H, T), jnp.float32)
    coarse, fine = (zero, zero) if arrays.g is None else tools.decay_sums(arrays.g, place, C)
    write = zero + 1.0 if arrays.u is None else _heads_first(arrays.u)
    first, first_end = zero - 1.0, zero - 1.0
    if documents is not None:
        first = jnp.broadcast_to(documents.first_BT[:, None], (B, H, T)).astype(jnp.float32)
        first_end = jnp.repeat(documents.first_end_BJ, C, axis=1)[:, None].astype(jnp.float32) + zero
    rows = jnp.stack([coarse, fine, write, first, first_end, zero, zero, zero], axis=2)
    return jnp.swapaxes(rows.reshape(B, H, ROWS, T // C, C), 2, 3)


def _operands(settings: Settings, arrays: Arrays, at: Layout, gates: Array) -> dict[str, Any]:
    return {
        "q": (_heads_first(arrays.q), at.tokens(at.Hk, at.K)),
        "k": (_heads_first(arrays.k), at.tokens(at.Hk, at.K)),
        "v": (_heads_first(arrays.v), at.tokens(at.H, at.V)),
        "gates": (gates, at.tile()),
    }


def forward(settings: Settings, arrays: Arrays, segment_ids: Array | None) -> tuple[Array, Array | None, Array | None]:
    documents, place = tools.documents(segment_ids, settings.chunk)
    at = Layout(settings, arrays)
    inputs = _operands(settings, arrays, at, _gates(settings, arrays, documents, place))
    if arrays.state is not None:
        inputs["state"] = arrays.state, at.state()
    outputs = {"o": at.output(at.H, at.V, arrays.v.dtype)}
    if settings.return_final:
        outputs["final"] = jax.ShapeDtypeStruct((at.B, at.H, at.K, at.V), jnp.float32), at.state()
    if settings.state_stride:
        outputs["states"] = at.states(settings.state_stride)
    found = at.launch(_forward_kernel, inputs, outputs, settings.state_stride or 1)
    return _heads_first(found["o"]), found.get("final"), found.get("states")


def backward(
    settings: Settings,
    arrays: Arrays,
    segment_ids: Array | None,
    do: Array,
    d_final: Array | None,
    d_states: Array | None,
) -> Arrays:
    documents, place = tools.documents(segment_ids, settings.chunk)
    gates, do = _gates(settings, arrays, documents, place), _heads_first(do)
    stride, decayed = settings.anchor, arrays.g is not None

    at = Layout(settings, arrays)
    # A query/key head that several value heads read has its gradient summed over them, in float32.
    key_dtype = arrays.q.dtype if at.Hk == at.H else jnp.float32
    inputs = _operands(settings, arrays, at, gates) | {"do": (do, at.tokens(at.H, at.V))}
    outputs = {"dq": at.output(at.H, at.K, key_dtype)}
    if arrays.state is not None:
        inputs["state"] = arrays.state, at.state()
    if decayed:
        outputs["felt"] = at.felt()
        outputs["anchors"] = at.states(stride)
    reads = at.launch(_reads_kernel, inputs, outputs, stride)

    at = Layout(settings, arrays, reverse=True)
    inputs = _operands(settings, arrays, at, gates) | {"do": (do, at.tokens(at.H, at.V))}
    outputs = {
        "dk": at.output(at.H, at.K, key_dtype),
        "dv": at.output(at.H, at.V, arrays.v.dtype),
        "felt": at.felt(),
    }
    if d_final is not None:
        inputs["d_final"] = d_final, at.state()
    if d_states is not None:
        inputs["d_states"] = d_states, at.states(stride)[1]
    if decayed:
        inputs["anchors"] = reads["anchors"], at.states(stride)[1]
    if arrays.state is not None:
        outputs["d_initial"] = jax.ShapeDtypeStruct((at.B, at.H, at.K, at.V), jnp.float32), at.state()
    writes = at.launch(_writes_kernel, inputs, outputs, stride)

    def tokens(felt: Array, row: int) -> Array:
        """(1, B, H, T), as the GPU's kernels give it: one slab's part."""
        return felt[:, :, :, row].reshape(1, at.B, at.H, at.T)

    dg = None
    if decayed:
        of_reads = {"pairs": tokens(reads["felt"], 0), "reads": tokens(reads["felt"], 1)}
        last = np.minimum(stride * np.arange(1, -(-at.J // stride) + 1), at.J) - 1
        of_writes = {"writes": tokens(writes["felt"], 1), "through": writes["felt"][None, :, :, last, 2, 0]}
        dg = _pallas_add_scalar.decay_gradient(of_reads, of_writes, documents, settings.chunk, stride)
    return Arrays(
        q=tools.by_key_head(_heads_first(reads["dq"]), arrays.q),
        k=tools.by_key_head(_heads_first(writes["dk"]), arrays.k),
        v=_heads_first(writes["dv"]),
        g=dg,
        u=tools.write_gradient(settings, arrays, {"du": tokens(writes["felt"], 0)}),
        state=writes.get("d_initial"),
    )
