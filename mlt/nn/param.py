"""The only maker of parameters: each is described (shape, axes, init, dtype) before any memory is spent.

A module built from a config holds `ParamSpec` leaves. The same tree then serves the parameter table, the shardings,
the memory plan and, through `initialize`, the arrays themselves. Modules are plain trees: every jax transform
applies to them directly.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

M = TypeVar("M")
Group = Literal["matrix", "embedding", "table", "vector"]
"""What an optimizer may treat differently: dense matrices, token embeddings, sparse tables, and everything that is
never decayed (norm scales, gates, decays, biases)."""


BLOCK_VALUES = 2**20
"""Values of a table that are drawn at once: 4 MB."""


class Buffer(nnx.Variable):
    """State that no gradient trains: router biases, token maps. The train step applies its updates."""


@dataclasses.dataclass(frozen=True)
class Init:
    """A named initializer. `fn(rng, shape)` gives float32 or integer values; `text` is what parameter tables print; `layer`
    is the initializer of one layer where layers are stacked."""

    text: str
    fn: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray] = dataclasses.field(compare=False, repr=False)
    layer: "Init | None" = dataclasses.field(default=None, compare=False, repr=False)


def normal(std: float) -> Init:
    return Init(f"normal({std:.4g})", lambda rng, shape: np.float32(std) * rng.standard_normal(shape, np.float32))


def fan_in(size: int, *, scale: float = 1.0) -> Init:
    """Normal with standard deviation `scale / sqrt(size)`, `size` being the contracted width."""
    return normal(scale * size**-0.5)


def uniform(low: float, high: float) -> Init:
    return Init(f"uniform({low:.4g}, {high:.4g})", lambda rng, shape: rng.uniform(low, high, shape))


def constant(value: float) -> Init:
    return Init(f"constant({value:g})", lambda rng, shape: np.full(shape, value, np.float32))


zeros = constant(0.0)
ones = constant(1.0)


def given(values: np.ndarray, name: str) -> Init:
    """Fixed values, for buffers such as token maps."""
    return Init(name, lambda rng, shape: np.broadcast_to(values, shape))


def numbered(first: int, stride: int) -> Init:
    """first + stride * i for the i-th copy of a module that is stacked for `lax.scan`, and `first` for a single one."""

    def fn(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        copies = rng.bit_generator.seed_seq.spawn_key  # of the copy, as `ParamSpec.stacked` draws it
        return np.full(shape, first + stride * (copies[-1] if copies else 0))

    return Init(f"{first} + {stride} i", fn)


def log_of_uniform(low: float, high: float) -> Init:
    """log(U(low, high)): the Mamba-2 and gated delta rule initialization of `A_log` (arXiv 2405.21060)."""
    return Init(f"log_uniform({low:g}, {high:g})", lambda rng, shape: np.log(rng.uniform(low, high, shape)))


def inverse_softplus_of_step(low: float = 1e-3, high: float = 0.1, floor: float = 1e-4) -> Init:
    """softplus^-1 of a step size drawn log-uniformly from [low, high]: `dt_bias` of Mamba (arXiv 2312.00752)."""

    def fn(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        step = np.maximum(np.exp(rng.uniform(np.log(low), np.log(high), shape)), floor)
        return step + np.log(-np.expm1(-step))

    return Init(f"inverse_softplus_step({low:g}, {high:g})", fn)


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter before it exists.

    Attributes:
        shape: sizes, one per dim.
        axes: logical axis name per dim, None where the dim is never sharded.
        init: how the values are made.
        dtype: storage type; float32 for everything that is trained.
        group: what the optimizer may treat differently.
        trainable: False for buffers.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Init
    dtype: str = "float32"
    group: Group = "matrix"
    trainable: bool = True

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(
                f"ParamSpec: shape {self.shape} has {len(self.shape)} dims but axes {self.axes} name {len(self.axes)}"
            )

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.size * jnp.dtype(self.dtype).itemsize

    def stacked(self, count: int) -> "ParamSpec":
        """The same parameter for `count` layers, stacked on a new leading dim, each layer drawn on its own."""
        inner = self.init

        def fn(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
            return np.stack([inner.fn(layer, shape[1:]) for layer in rng.spawn(shape[0])])

        axes = ("layers", *self.axes)
        return dataclasses.replace(self, shape=(count, *self.shape), axes=axes, init=Init(inner.text, fn, inner))

    def make(self, seed: int, name: str) -> np.ndarray:
        """The values of the parameter called `name` in a run with this seed."""
        if self.group == "table":
            return self.make_rows(seed, name, 0, self.shape[-2])
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, zlib.crc32(name.encode())])))
        return np.asarray(self.init.fn(rng, self.shape)).astype(self.dtype)

    def make_rows(self, seed: int, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` - 1 of a table, (M, V) or stacked (L, M, V), of every layer.

        Each block of rows has a generator of its own, so what is drawn does not depend on who draws it, and no more is held
        than the rows and a block. The first block is drawn as a parameter that is no table would be.
        """
        layers = range(self.shape[0]) if self.init.layer is not None else (None,)
        drawn = np.empty((len(layers), stop - start, self.shape[-1]), self.dtype)
        block = max(1, BLOCK_VALUES // self.shape[-1])
        for place, layer in enumerate(layers):
            init, spawned = (self.init, ()) if layer is None else (self.init.layer, (layer,))
            for number in range(start // block, -(-stop // block)):
                words = [seed, zlib.crc32(name.encode()), *([number] if number else [])]
                rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(words, spawn_key=spawned)))
                first, last = number * block, min((number + 1) * block, self.shape[-2])
                values = np.asarray(init.fn(rng, (last - first, self.shape[-1])))
                low, high = max(first, start), min(last, stop)
                drawn[place, low - start : high - start] = values[low - first : high - first]
        return drawn if self.init.layer is not None else drawn[0]

    def abstract(self, sharding: jax.sharding.Sharding | None = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, jnp.dtype(self.dtype), sharding=sharding)


def param(shape: tuple[int, ...], axes: tuple[str | None, ...], init: Init, *, group: Group | None = None) -> nnx.Param:
    """Describe a trained float32 parameter. One-dim parameters join the undecayed group unless told otherwise."""
    group = group or ("matrix" if len(shape) > 1 else "vector")
    return nnx.Param(ParamSpec(shape, axes, init, group=group))


def buffer(shape: tuple[int, ...], axes: tuple[str | None, ...], init: Init, *, dtype: str = "float32") -> Buffer:
    """Describe a value that no gradient trains."""
    return Buffer(ParamSpec(shape, axes, init, dtype=dtype, group="vector", trainable=False))


def path_name(path: tuple[Any, ...]) -> str:
    """`stack.period.0.mixers.1.query.kernel` for a key path of a module tree."""
    parts = []
    for key in path:
        part = getattr(key, "name", None) or getattr(key, "key", None)
        if part is None:
            part = getattr(key, "idx", key)
        parts.append(str(part))
    # The last step of a path is from a variable to what it holds.
    return ".".join(parts[:-1] if parts[-1:] == ["value"] else parts)


def named_leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """(dotted name, leaf) for every leaf of a module tree, in tree order."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield path_name(path), leaf


def initialize(module: M, seed: int, shardings: M | None = None) -> M:
    """Turn described parameters into arrays.

    Each parameter draws from a counter-based generator of its own, seeded by `seed` and its name: adding or removing
    one leaves the others as they were, and every mesh, platform and JAX version starts from the same bits. Drawing on
    the host keeps it out of the compiler, where one random program a shape would cost more than the first steps. Of a
    table, a host draws the rows of its own devices alone.

    Args:
        module: the described tree.
        seed: of the run.
        shardings: a like tree of shardings; None puts everything on the default device.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(module)
    places = [None] * len(flat) if shardings is None else jax.tree.leaves(shardings)
    leaves = [_made(spec, seed, path_name(path), place) for (path, spec), place in zip(flat, places, strict=True)]
    return jax.tree_util.tree_unflatten(treedef, leaves)


def _made(spec: ParamSpec, seed: int, name: str, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if spec.group != "table" or sharding is None:
        return put(spec.make(seed, name), sharding)
    # Devices that hold the same rows share one draw.
    drawn: dict[tuple[int, int], list[jax.Device]] = {}
    indices = sharding.addressable_devices_indices_map(spec.shape)
    for device, index in indices.items():
        drawn.setdefault(index[-2].indices(spec.shape[-2])[:2], []).append(device)
    held = {}
    for (start, stop), devices in drawn.items():
        rows = spec.make_rows(seed, name, start, stop)
        for device in devices:
            others = tuple(slice(None) if dim == len(spec.shape) - 2 else part for dim, part in enumerate(indices[device]))
            held[device] = jax.device_put(rows[others], device)
    return jax.make_array_from_single_device_arrays(spec.shape, sharding, [held[device] for device in indices])


def put(values: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """An array of the whole mesh of values that every process has; no process sends any to another.

    `jax.device_put` would first compare the values of all processes, at the price of moving them.
    """
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(values, sharding)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def stack_specs(module: M, count: int) -> M:
    """Describe `count` copies of a described module, stacked for `lax.scan`."""
    return jax.tree.map(lambda spec: spec.stacked(count), module)


def partition(module: M) -> tuple[M, M]:
    """Split a module into (trained, buffers): two trees of the same structure with None in each other's places."""
    is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    trained = jax.tree.map(lambda v: _emptied(v) if isinstance(v, Buffer) else v, module, is_leaf=is_variable)
    buffers = jax.tree.map(lambda v: v if isinstance(v, Buffer) else _emptied(v), module, is_leaf=is_variable)
    return trained, buffers


def merge(trained: M, buffers: M) -> M:
    """Undo `partition`."""
    # Variable by variable: a stand-in for an array may be a tree of its own.
    is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    pick = lambda a, b: jax.tree.map(lambda leaf: leaf, b if isinstance(b, Buffer) else a)  # noqa: E731
    return jax.tree.map(pick, trained, buffers, is_leaf=is_variable)


def _emptied(variable: nnx.Variable) -> nnx.Variable:
    return jax.tree.map(lambda _: None, variable)
