"""The only place that wraps an op in `shard_map`.

Kernels are pure functions of local arrays and know no mesh. Under plain `jit` the partitioner may replicate a kernel
or invent collectives around it; here each argument's layout is named by logical axes, and the op runs on what a device
holds. `parallel/ops.py` has the ops that mixers call; what crosses devices inside them is written out there.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from mlt.parallel.rules import LOGICAL_TO_MESH, Rules

Axes = tuple[str | None, ...]

TOKENS: Axes = ("batch", "seq")
STREAM: Axes = ("batch", "seq", "stream")
CHANNELS: Axes = ("batch", "seq", "heads")
Q_HEADS: Axes = ("batch", "seq", "heads", None)
KV_HEADS: Axes = ("batch", "seq", "kv_heads", None)
HEADS: Axes = ("heads",)

(_SHARDS,) = LOGICAL_TO_MESH["embed"]


@dataclasses.dataclass(frozen=True)
class Whole:
    """Layout of a parameter that every device needs along `embed`, in the type that it computes in.

    Each shard is cast and then gathered. The gradient goes the other way in the parameter's type: scattered over the shards,
    and summed over devices without being rounded in between.

    Attributes:
        axes: logical axis of each dim.
        dtype: what `fn` is given on more than one device; on one it is given the parameter as it is.
    """

    axes: Axes
    dtype: Any


def local(fn: Callable[..., Any], rules: Rules, inputs: tuple[Axes | Whole, ...], output: Any) -> Callable[..., Any]:
    """`fn` on each device's own part of its arguments; `fn` itself when there is one device.

    Args:
        fn: a pure function of arrays; None arguments pass through. On more than one device it may use collectives
            over the mesh axes.
        inputs: logical axes of each argument, dim by dim. A dim of one is never split. A parameter may be `Whole`.
        output: logical axes of the result, or a tree of them.
    """
    if rules.mesh is None or rules.mesh.size == 1:
        return fn

    def run(*args: jax.Array | None) -> Any:
        present = [i for i, arg in enumerate(args) if arg is not None]
        specs = tuple(_spec(rules, inputs[i], args[i]) for i in present)

        def body(*parts: jax.Array) -> Any:
            full: list[jax.Array | None] = [None] * len(args)
            for i, part, spec in zip(present, parts, specs, strict=True):
                full[i] = _gathered(part, spec, inputs[i].dtype) if isinstance(inputs[i], Whole) else part
            return fn(*full)

        # Kernels know no mesh, so their constants are not marked as varying over it: that check must be off. Without it
        # the cotangent of an input is summed over the axes its layout leaves out, which is right as long as the output's
        # layout names every axis of more than one device.
        out = jax.tree.map(rules.spec, output, is_leaf=_is_axes)
        mapped = jax.shard_map(body, mesh=rules.mesh, in_specs=specs, out_specs=out, check_vma=False)
        return mapped(*(args[i] for i in present))

    return run


def _is_axes(x: Any) -> bool:
    return isinstance(x, tuple) and all(axis is None or isinstance(axis, str) for axis in x)


def _spec(rules: Rules, axes: Axes | Whole, arg: jax.Array) -> PartitionSpec:
    """The argument's layout; a dim of one (a single key head) is shared, not split."""
    kept = axes.axes if isinstance(axes, Whole) else axes
    if isinstance(axes, Whole) and rules.zero != 3:
        kept = tuple(None if axis == "embed" else axis for axis in kept)  # it lies whole on every device
    return rules.spec(tuple(axis if size > 1 else None for axis, size in zip(kept, arg.shape, strict=True)))


def _gathered(part: jax.Array, spec: PartitionSpec, dtype: Any) -> jax.Array:
    dim = spec.index(_SHARDS) if _SHARDS in spec else None
    return _cast_and_gathered(part, dim, dtype, part.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _cast_and_gathered(part, dim, dtype, kind):
    part = part.astype(dtype)
    return part if dim is None else jax.lax.all_gather(part, _SHARDS, axis=dim, tiled=True)


def _gathered_bwd(dim, dtype, kind, _, grad):
    grad = grad.astype(kind)
    return (grad if dim is None else jax.lax.psum_scatter(grad, _SHARDS, scatter_dimension=dim, tiled=True),)


_cast_and_gathered.defvjp(lambda *args: (_cast_and_gathered(*args), None), _gathered_bwd)
