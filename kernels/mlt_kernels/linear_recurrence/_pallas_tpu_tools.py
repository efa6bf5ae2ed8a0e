"""What the TPU kernels share: factors of one chunk, layout of arrays, launch.

A TPU core runs the last dim of its grid in order, here the chunks, with a whole state in fast memory. Arrays are laid out head
by head, since blocks end in whole tiles; what belongs to a token and head travels as one of the 8 rows of a tile (8, C) a
chunk.

Letters: B rows, T tokens, J chunks, C tokens of a chunk (i as query, j as key), H value heads, K key dim, V value dim.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from mlt_kernels import pallas
from mlt_kernels.linear_recurrence import _kernel_inputs as given
from mlt_kernels.linear_recurrence._kernel_inputs import Arrays
from mlt_kernels.linear_recurrence._pallas_tools import Refs, Settings

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


def dot(a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    """Product of two tiles over the dims named, accumulated in float32; of float32 tiles in full float32."""
    numbers = (((contract[0],), (contract[1],)), ((), ()))
    precision = given.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=jnp.float32)


def factors(tile: Array) -> Chunk:
    """Decays and write strengths from the chunk's tile (8, C) of `gate_tiles`."""
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


def row_sums(x: Array) -> Array:
    """(1, C): the sum of each row of x (C, D), as a row."""
    return dot(jnp.ones((ROWS, x.shape[1]), jnp.float32), x, (1, 1))[:1, :]


def start(refs: Refs, name: str, state: Any) -> None:
    """The scratch `state` before the first chunk of a row and head."""

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        state[...] = refs[name][...] if name in refs else jnp.zeros(state.shape, jnp.float32)


def keep(refs: Refs, entering: Array, stride: int) -> None:
    """Leaves the state that enters every `stride`-th chunk, if the call asks for it."""
    if "states" in refs:

        @pl.when(pl.program_id(2) % stride == 0)
        def _() -> None:
            refs["states"][...] = entering.astype(refs["states"].dtype)


def add_cotangent(refs: Refs, d_state: Any, c: Any, stride: int) -> None:
    """Adds to the scratch `d_state` the cotangent of the state that the caller got in front of chunk c, if it got one."""
    if "d_states" in refs:

        @pl.when(c % stride == 0)
        def _() -> None:
            d_state[...] += refs["d_states"][...]


def finish(refs: Refs, name: str, state: Any, J: int) -> None:
    """Leaves the scratch `state` behind the last step of a row and head, if the call asks for it."""
    if name in refs:

        @pl.when(pl.program_id(2) == J - 1)
        def _() -> None:
            refs[name][...] = state[...]


class Layout:
    """Blocks of arrays laid out (B, heads, T, dim); programs are (row, value head, chunk)."""

    def __init__(self, settings: Settings, arrays: Arrays, *, reverse: bool = False):
        self.B, self.T, self.H, self.V = arrays.v.shape
        self.Hk, self.K = arrays.q.shape[2:]
        self.C, self.J = settings.chunk, self.T // settings.chunk
        self.settings, self.reverse = settings, reverse

    def place(self, c: Any) -> Any:
        """The chunk that step c of the grid takes."""
        return self.J - 1 - c if self.reverse else c

    def tokens(self, heads: int, dim: int) -> pl.BlockSpec:
        """(B, heads, T, dim)."""
        group = self.H // heads
        return pl.BlockSpec((None, None, self.C, dim), lambda b, h, c: (b, h // group, self.place(c), 0))

    def tile(self) -> pl.BlockSpec:
        """(B, H, J, 8, C)."""
        return pl.BlockSpec((None, None, None, ROWS, self.C), lambda b, h, c: (b, h, self.place(c), 0, 0))

    def state(self) -> pl.BlockSpec:
        """(B, H, K, V)."""
        return pl.BlockSpec((None, None, self.K, self.V), lambda b, h, c: (b, h, 0, 0))

    def whole_state(self) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        """(B, H, K, V) float32, as an output."""
        return jax.ShapeDtypeStruct((self.B, self.H, self.K, self.V), jnp.float32), self.state()

    def states(self, stride: int, dtype: Any = jnp.float32) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        """(B, N, H, K, V): one for every `stride` chunks."""
        shape = jax.ShapeDtypeStruct((self.B, -(-self.J // stride), self.H, self.K, self.V), dtype)
        block = (None, None, None, self.K, self.V)
        return shape, pl.BlockSpec(block, lambda b, h, c: (b, self.place(c) // stride, h, 0, 0))

    def felt(self) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        """(B, H, J, 8, C) float32: in its rows, numbers of a token and head."""
        return jax.ShapeDtypeStruct((self.B, self.H, self.J, ROWS, self.C), jnp.float32), self.tile()

    def square(self) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        """(B, H, J, C, C) float32."""
        shape = jax.ShapeDtypeStruct((self.B, self.H, self.J, self.C, self.C), jnp.float32)
        return shape, pl.BlockSpec((None, None, None, self.C, self.C), lambda b, h, c: (b, h, self.place(c), 0, 0))

    def output(self, heads: int, dim: int, dtype: Any) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        """(B, heads, T, dim), as an output."""
        return jax.ShapeDtypeStruct((self.B, heads, self.T, dim), dtype), self.tokens(heads, dim)

    def launch(self, kernel: Callable[..., None], inputs: dict[str, Any], outputs: dict[str, Any], stride: int) -> Any:
        """Runs a kernel of (refs by name, scratch (K, V) float32, scale, J, stride); its arrays come and go by name."""
        names = [*inputs, *outputs]

        def body(*refs: Any) -> None:
            *arrays, state = refs
            by_name = dict(zip(names, arrays, strict=True))
            kernel(by_name, state, scale=self.settings.scale, J=self.J, stride=stride)

        body.__name__ = getattr(kernel, "func", kernel).__name__.strip("_")
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


def run_forward(
    settings: Settings, arrays: Arrays, at: Layout, kernel: Callable[..., None], inputs: dict[str, Any]
) -> tuple[Array, Array | None, Array | None]:
    """o (B, T, H, V), the final state and the states by `state_stride`, of a forward kernel and its operands."""
    if arrays.state is not None:
        inputs = inputs | {"state": (arrays.state, at.state())}
    outputs = {"o": at.output(at.H, at.V, arrays.v.dtype)}
    if settings.return_final:
        outputs["final"] = at.whole_state()
    if settings.state_stride:
        outputs["states"] = at.states(settings.state_stride)
    found = at.launch(kernel, inputs, outputs, settings.state_stride or 1)
    return heads_first(found["o"]), found.get("final"), found.get("states")


def heads_first(x: Array) -> Array:
    """(B, T, heads, dim) to (B, heads, T, dim), or back."""
    return jnp.swapaxes(x, 1, 2)


def gate_tiles(settings: Settings, arrays: Arrays, documents: given.Documents | None, place: Array | None) -> Array:
    """(B, H, J, 8, C): write strengths, sums of log decays if scalar, and documents, one a row."""
    B, T, H, _ = arrays.v.shape
    C = settings.chunk
    zero = jnp.zeros((B, H, T), jnp.float32)
    coarse, fine = (zero, zero) if arrays.g is None else given.decay_sums(arrays.g, place, C)
    write = zero + 1.0 if arrays.u is None else heads_first(arrays.u)
    first, first_end = zero - 1.0, zero - 1.0
    if documents is not None:
        first = jnp.broadcast_to(documents.first_BT[:, None], (B, H, T)).astype(jnp.float32)
        first_end = jnp.repeat(documents.first_end_BJ, C, axis=1)[:, None].astype(jnp.float32) + zero
    rows = jnp.stack([coarse, fine, write, first, first_end, zero, zero, zero], axis=2)
    return jnp.swapaxes(rows.reshape(B, H, ROWS, T // C, C), 2, 3)


def operands(arrays: Arrays, at: Layout, gates: Array) -> dict[str, Any]:
    """Inputs that every kernel has."""
    return {
        "q": (heads_first(arrays.q), at.tokens(at.Hk, at.K)),
        "k": (heads_first(arrays.k), at.tokens(at.Hk, at.K)),
        "v": (heads_first(arrays.v), at.tokens(at.H, at.V)),
        "gates": (gates, at.tile()),
    }
