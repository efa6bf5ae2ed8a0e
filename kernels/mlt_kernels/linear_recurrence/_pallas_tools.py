"""Parts of the Pallas-Triton kernels of the add rule: products, block sizes, layout of arrays, launches. Walks: `_pallas_walk`.

Letters: B rows, T tokens, J chunks, C tokens of a chunk, H value heads, K key dim, V value dim.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from mlt_kernels import pallas, tuned
from mlt_kernels.linear_recurrence._kernel_inputs import HIGHEST, OF_VALUES, Arrays, Documents, decay_sums

TOKEN_PARALLEL = ("pairs", "inner")
"""Kernels of vector decays whose programs own a chunk, with all of K and V."""


def dot(a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    """Product of two tiles over the dims named, accumulated in float32.

    float32 tiles are multiplied as three TF32 products (22 bits), which tensor cores do; a CPU that interprets the
    kernel has the full product.
    """
    precision: Any = None
    if a.dtype == jnp.float32:
        precision = HIGHEST if pallas.interpreting() else jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    numbers = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=jnp.float32)


def full_dot(a: Array, b: Array) -> Array:
    """Product of two small float32 tiles in float32 arithmetic."""
    preset = HIGHEST if pallas.interpreting() else jax.lax.DotAlgorithmPreset.F32_F32_F32
    return jax.lax.dot(a, b, precision=preset, preferred_element_type=jnp.float32)


def rows(x: Array, *by: Array | None) -> Array:
    """x (C, D) as float32 with its rows times the factors; x itself where there is none."""
    given = [f for f in by if f is not None]
    return x if not given else x.astype(jnp.float32) * functools.reduce(jnp.multiply, given)[:, None]


def update(state: Array, factor: Array | None, left: Array, right: Array) -> Array:
    """factor state + left^T right."""
    added = dot(left, right, (0, 0))
    return added + (state if factor is None else factor * state)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of one kernel: tokens of a chunk, width of a program's slab of the state, warps and pipeline stages."""

    chunk: int
    slab: int
    warps: int
    stages: int


def blocks(kernel: str, K: int, V: int, item_bytes: int, *, vector: bool) -> Blocks:
    """Block sizes of `forward`, `queries`, `keys`, `values` and, with vector decays, the token-parallel `pairs` and `inner`:
    the rule's, or those measured on the device.
    """
    if pallas.interpreting():  # Small, so that small tests cross every kind of border.
        return Blocks(chunk=16, slab=16, warps=4, stages=1)
    rule = _rule(kernel, K, V, item_bytes, vector)
    given = {name: getattr(rule, name) for name in ("slab", "warps", "stages")[kernel in TOKEN_PARALLEL :]}
    shape = {"K": K, "V": V, "item_bytes": item_bytes, "vector": vector}
    return dataclasses.replace(rule, **tuned.sizes("linear_recurrence", "pallas_gpu", kernel, shape, given))


def _rule(kernel: str, K: int, V: int, item_bytes: int, vector: bool) -> Blocks:
    """One choice that serves every GPU: registers and spills for sm_90a are in kernels/reports/registers.md."""
    if kernel in TOKEN_PARALLEL:
        return Blocks(chunk=16, slab=K, warps=8 if K > 128 else 4 if K > 64 else 2, stages=1)
    across, along = (K, V) if kernel in OF_VALUES else (V, K)
    if vector:
        slab = min(along, 64 if across <= 128 else 32)
        return Blocks(chunk=16, slab=slab, warps=8 if across * slab > 4096 else 4, stages=2)
    if item_bytes == 4:  # Three TF32 products a product: only small tiles stay near the registers there are.
        return Blocks(chunk=16, slab=min(along, 32), warps=4 if across <= 128 else 8, stages=1)
    if max(K, V) > 128:
        return Blocks(chunk=32, slab=min(along, 32), warps=8, stages=2)
    if kernel == "values" and across > 64:
        return Blocks(chunk=64, slab=min(along, 32), warps=4, stages=2)
    return Blocks(chunk=64, slab=min(along, 64), warps=8, stages=3)


Refs = dict[str, Any]
"""The kernel's arrays by name; one that a call has no use for is absent."""


def launch(
    kernel: Callable[[Refs], None],
    *,
    grid: tuple[int, ...],
    inputs: dict[str, tuple[Array, pl.BlockSpec]],
    outputs: dict[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
    sizes: Blocks,
) -> dict[str, Array]:
    """Runs a Triton kernel over a grid; its arrays come and go by name."""
    names = [*inputs, *outputs]

    def body(*refs: Any) -> None:
        kernel(dict(zip(names, refs, strict=True)))

    body.__name__ = getattr(kernel, "func", kernel).__name__.strip("_")
    results = pl.pallas_call(
        body,
        grid=grid,
        in_specs=[spec for _, spec in inputs.values()],
        out_specs=[spec for _, spec in outputs.values()],
        out_shape=[shape for shape, _ in outputs.values()],
        compiler_params=pallas.triton_params(num_warps=sizes.warps, num_stages=sizes.stages),
        interpret=pallas.interpreting(),
    )(*(array for array, _ in inputs.values()))
    return dict(zip(outputs, results, strict=True))


@dataclasses.dataclass(frozen=True)
class Settings:
    """What does not change with the numbers of a call."""

    platform: str  # "gpu" or "tpu"
    rule: str  # "add" or, on a TPU, "delta"
    scale: float
    chunk: int
    return_final: bool
    state_stride: int | None  # chunks between two returned states
    gated_writes: bool  # write strengths have a gradient
    anchor: int  # chunks between two states left for the decays' gradients; the same where states are returned
    interpreting: bool


class Layout:
    """Grid and blocks of one kernel's arrays: programs are (slab, or chunk if token-parallel; value head; row)."""

    def __init__(self, settings: Settings, arrays: Arrays, kernel: str):
        B, T, H, V = arrays.v.shape
        Hk, K = arrays.q.shape[2:]
        vector = arrays.g is not None and arrays.g.ndim == 4
        self.sizes = blocks(kernel, K, V, arrays.q.dtype.itemsize, vector=vector)
        self.of_values = kernel in OF_VALUES
        self.slab = K if kernel in TOKEN_PARALLEL else self.sizes.slab
        self.slabs = (V if self.of_values else K) // self.slab
        self.grid = (T // settings.chunk if kernel in TOKEN_PARALLEL else self.slabs, H, B)
        self.B, self.T, self.H, self.K, self.V, self.repeats = B, T, H, K, V, H // Hk
        self.chunk, self.chunks = settings.chunk, T // settings.chunk

    def keys(self, heads: int) -> pl.BlockSpec:
        """(B, T, heads, K): q, k and their gradients."""
        group = self.H // heads
        if self.of_values:
            return pl.BlockSpec((None, self.T, None, self.K), lambda x, h, b: (b, 0, h // group, 0))
        return pl.BlockSpec((None, self.T, None, self.slab), lambda x, h, b: (b, 0, h // group, x if self.slabs > 1 else 0))

    def values(self) -> pl.BlockSpec:
        """(B, T, H, V)."""
        if self.of_values:
            return pl.BlockSpec((None, self.T, None, self.slab), lambda x, h, b: (b, 0, h, x))
        return pl.BlockSpec((None, self.T, None, self.V), lambda x, h, b: (b, 0, h, 0))

    def state(self) -> pl.BlockSpec:
        """(B, H, K, V)."""
        if self.of_values:
            return pl.BlockSpec((None, None, self.K, self.slab), lambda x, h, b: (b, h, 0, x))
        return pl.BlockSpec((None, None, self.slab, self.V), lambda x, h, b: (b, h, x, 0))

    def states(self, number: int) -> pl.BlockSpec:
        """(B, number, H, K, V)."""
        if self.of_values:
            return pl.BlockSpec((None, number, None, self.K, self.slab), lambda x, h, b: (b, 0, h, 0, x))
        return pl.BlockSpec((None, number, None, self.slab, self.V), lambda x, h, b: (b, 0, h, x, 0))

    def whole_state(self) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        """(B, H, K, V) float32, as an output."""
        return jax.ShapeDtypeStruct((self.B, self.H, self.K, self.V), jnp.float32), self.state()

    def states_out(self, number: int) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        """(B, number, H, K, V) float32, as an output."""
        return jax.ShapeDtypeStruct((self.B, number, self.H, self.K, self.V), jnp.float32), self.states(number)

    def key_sums(self, *length: int) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        """(B, H, length, K) float32, or (B, H, K)."""
        block = (None, None, *length, self.slab)
        spec = pl.BlockSpec(block, lambda x, h, b: (b, h, *[0] * len(length), x))
        return jax.ShapeDtypeStruct((self.B, self.H, *length, self.K), jnp.float32), spec

    def partial(self, length: int) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        """(X, B, H, length) float32: every slab's part of a sum over the whole dim."""
        shape = jax.ShapeDtypeStruct((self.slabs, self.B, self.H, length), jnp.float32)
        return shape, pl.BlockSpec((None, None, None, length), lambda x, h, b: (x, b, h, 0))

    def gates(self, arrays: Arrays, documents: Documents | None, place: Array | None) -> dict[str, Any]:
        """Inputs that every kernel has: log decays (if scalar, their sums), write strengths, documents."""
        by_head = pl.BlockSpec((None, None, self.T), lambda x, h, b: (b, h, 0))
        inputs: dict[str, Any] = {}
        if arrays.g is not None and arrays.g.ndim == 4:
            inputs["g"] = arrays.g, self.keys(self.H)
        elif arrays.g is not None:
            coarse, fine = decay_sums(arrays.g, place, self.chunk)
            inputs |= {"coarse": (coarse, by_head), "fine": (fine, by_head)}
        if arrays.u is not None:
            inputs["u"] = jnp.swapaxes(arrays.u, 1, 2), by_head
        if documents is not None:
            inputs["first"] = documents.first_BT, pl.BlockSpec((None, self.T), lambda x, h, b: (b, 0))
            inputs["first_end"] = documents.first_end_BJ, pl.BlockSpec((None, self.chunks), lambda x, h, b: (b, 0))
        return inputs


def operands(arrays: Arrays, at: Layout) -> dict[str, Any]:
    """q, k and v."""
    keys = at.keys(arrays.q.shape[2])
    return {"q": (arrays.q, keys), "k": (arrays.k, keys), "v": (arrays.v, at.values())}


def state_gradients(at: Layout, d_final: Array | None, d_states: Array | None) -> dict[str, Any]:
    """Cotangents of the states that the caller got."""
    inputs: dict[str, Any] = {} if d_final is None else {"d_final": (d_final, at.state())}
    if d_states is not None:
        inputs["d_states"] = d_states, at.states(d_states.shape[1])
    return inputs


def sweep(
    settings: Settings,
    arrays: Arrays,
    documents: Documents | None,
    at: Layout,
    kernel: Callable[..., None],
    inputs: dict[str, Any],
    outputs: dict[str, Any],
    stride: int | None,
    place: Array | None = None,
) -> dict[str, Array]:
    """Launches a kernel that walks over the chunks."""
    shape = (at.K, at.slab) if at.of_values else (at.slab, at.V)
    return launch(
        functools.partial(kernel, scale=settings.scale, C=at.chunk, J=at.chunks, stride=stride, shape=shape),
        grid=at.grid,
        inputs=operands(arrays, at) | at.gates(arrays, documents, place) | inputs,
        outputs=outputs,
        sizes=at.sizes,
    )


def forward_outputs(settings: Settings, arrays: Arrays, at: Layout) -> dict[str, Any]:
    """o and, where they are asked for, the final state and the states that enter every `state_stride`-th chunk."""
    outputs: dict[str, Any] = {"o": (jax.ShapeDtypeStruct(arrays.v.shape, arrays.v.dtype), at.values())}
    if settings.return_final:
        outputs["final"] = at.whole_state()
    if settings.state_stride:
        outputs["states"] = at.states_out(-(-at.chunks // settings.state_stride))
    return outputs


def values_outputs(settings: Settings, arrays: Arrays, at: Layout) -> dict[str, Any]:
    """dv and, where they have gradients, what write strengths feel and the cotangent of the initial state."""
    outputs: dict[str, Any] = {"dv": (jax.ShapeDtypeStruct(arrays.v.shape, arrays.v.dtype), at.values())}
    if settings.gated_writes:
        outputs["du"] = at.partial(at.T)
    if arrays.state is not None:
        outputs["d_initial"] = at.whole_state()
    return outputs


def write_gradient(settings: Settings, arrays: Arrays, of_values: dict[str, Array]) -> Array | None:
    """(B, T, H): the sum over the slabs; zeros if write strengths only mark padding."""
    if settings.gated_writes:
        return jnp.swapaxes(jnp.sum(of_values["du"], axis=0), 1, 2)
    return None if arrays.u is None else jnp.zeros_like(arrays.u)
