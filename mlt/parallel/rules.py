"""One table from logical axes to mesh axes, and the shardings that follow from it."""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from mlt.errors import UserError
from mlt.nn.param import named_leaves
from mlt.parallel.carry import EXCHANGES
from mlt.parallel.crossings import STRATEGIES

LOGICAL_TO_MESH: dict[str, tuple[str, ...]] = {
    "batch": ("replica", "fsdp", "expert"),
    "seq": ("context",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "ffn": ("tensor",),
    "experts": ("expert",),
    "vocab": ("tensor",),
    "memory": ("fsdp",),
    "layers": (),
    "branches": (),
    # The residual stream's width: never sharded, unlike the same dim of a parameter.
    "stream": (),
}


@dataclasses.dataclass(frozen=True)
class Rules:
    """Where arrays live. `mesh=None` means one device and no constraints.

    Attributes:
        mesh: the devices.
        carry: how states of recurrences cross sequence shards (`carry.EXCHANGES`).
        attention: what of attention crosses sequence shards (`crossings.STRATEGIES`); None takes what moves least.
        zero: what `fsdp` splits: 3 parameters, gradients and optimizer state, 2 the last two, 1 the optimizer state alone.
            Sparse tables are always split.
    """

    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None
    carry: str = "gather"
    attention: str | None = None
    zero: int = 3

    def exchanging(self, how: str) -> "Rules":
        """The same layout for a layer that crosses sequence shards in a way of its own.

        A name moves what it is a name for: states, keys and values, or ("gather", "ring") both.
        """
        states = how if how in EXCHANGES else self.carry
        return dataclasses.replace(self, carry=states, attention=how if how in STRATEGIES else self.attention)

    def size(self, logical: str) -> int:
        """Number of shards along a logical axis."""
        if self.mesh is None:
            return 1
        count = 1
        for axis in LOGICAL_TO_MESH[logical]:
            count *= self.mesh.shape[axis]
        return count

    def spec(self, axes: tuple[str | None, ...]) -> PartitionSpec:
        """PartitionSpec of an array whose dims carry these logical axes.

        Raises:
            ValueError: an axis is unknown, or two dims of one array would take the same mesh axis.
        """
        taken: dict[str, str] = {}
        parts: list[Any] = []
        for axis in axes:
            if axis is not None and axis not in LOGICAL_TO_MESH:
                raise ValueError(f"unknown logical axis {axis!r}; the axes are {', '.join(LOGICAL_TO_MESH)}")
            names = LOGICAL_TO_MESH[axis] if axis is not None else ()
            for name in names:
                if name in taken:
                    raise ValueError(f"axes {axes}: {axis!r} and {taken[name]!r} both map to mesh axis {name!r}")
                taken[name] = axis
            parts.append(names[0] if len(names) == 1 else (names or None))
        return PartitionSpec(*parts)

    def sharding(self, axes: tuple[str | None, ...]) -> NamedSharding | None:
        return None if self.mesh is None else NamedSharding(self.mesh, self.spec(axes))

    def constrain(self, x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        """Pin an activation's layout; nothing on one device."""
        if self.mesh is None or self.mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, self.sharding(axes))

    def param_shardings(self, module: Any) -> Any:
        """The tree of shardings of a described module's parameters.

        Raises:
            UserError: a parameter's size does not divide by the shards of its axis; every such size is listed.
        """
        if self.mesh is None:
            raise ValueError("param_shardings needs a mesh")
        problems = self.indivisible(module)
        if problems:
            lines = [f"  mesh.{axes} = {shards}: {rule}; {ways}" for axes, shards, rule, ways in problems]
            raise UserError("the model does not fit this mesh:\n" + "\n".join(lines))
        whole = () if self.zero == 3 else ("embed",)
        return jax.tree.map(lambda spec: self.sharding(tuple(None if a in whole else a for a in spec.axes)), module)

    def gradient_shardings(self, module: Any) -> Any | None:
        """The tree of shardings of a described module's gradients where they lie elsewhere than the parameters; or None."""
        if self.mesh is None or self.zero != 2:
            return None
        return jax.tree.map(lambda spec: self.sharding(spec.axes), module)

    def indivisible(self, module: Any) -> list[tuple[str, int, str, str]]:
        """What of a described module cannot be laid out: (mesh axes, shards, rule, ways out), one for each mesh axis."""
        found: dict[str, dict[tuple[str, int], list[str]]] = {}
        for name, spec in named_leaves(module):
            for axis, size in zip(spec.axes, spec.shape, strict=True):
                if axis is not None and size % self.size(axis):
                    sizes = found.setdefault(axis, {})
                    sizes.setdefault((axis, size), []).append(name)
        by_mesh: dict[str, dict[tuple[str, int], list[str]]] = {}
        for axis, sizes in found.items():
            by_mesh.setdefault(" * ".join(LOGICAL_TO_MESH[axis]), {}).update(sizes)
        return [(axes, *self._describe(sizes)) for axes, sizes in by_mesh.items()]

    def _describe(self, sizes: dict[tuple[str, int], list[str]]) -> tuple[int, str, str]:
        shards = self.size(next(iter(sizes))[0])
        listed = []
        for (axis, size), names in sorted(sizes.items()):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            listed.append(f"{axis} of {size} ({names[0]}{more})")
        common = math.gcd(*(size for _, size in sizes))
        fitting = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0 and n <= 2 * shards)
        return shards, f"does not divide {', '.join(listed)}", f"use {fitting}, or sizes that are multiples of {shards}"
