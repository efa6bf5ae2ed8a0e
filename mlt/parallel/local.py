"""The only place that wraps an op in `shard_map`.

Kernels are pure functions of local arrays and know no mesh. Under plain `jit` the partitioner may replicate a kernel
or invent collectives around it; here each argument's layout is named by role, and the op runs on what a device holds.
"""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from mlt.parallel.rules import Rules

ROLES: dict[str, tuple[str | None, ...]] = {
    "tokens": ("batch", "seq"),
    "stream": ("batch", "seq", "stream"),
    "channels": ("batch", "seq", "heads"),
    "q": ("batch", "seq", "heads", None),
    "kv": ("batch", "seq", "kv_heads", None),
    "heads": ("heads",),
    "state": ("batch", "heads", None, None),
}
"""Logical axes of an op's arguments, by the part they play."""


def local(fn: Callable[..., jax.Array], rules: Rules, inputs: tuple[str, ...], output: str) -> Callable[..., jax.Array]:
    """`fn` on each device's own part of its arguments; `fn` itself when there is one device.

    Args:
        fn: a pure function of arrays; None arguments pass through.
        inputs: role of each argument, keys of `ROLES`.
        output: role of the result.
    """
    if rules.mesh is None or rules.mesh.size == 1:
        return fn

    def run(*args: jax.Array | None) -> jax.Array:
        present = [i for i, arg in enumerate(args) if arg is not None]
        specs = tuple(_spec(rules, inputs[i], args[i]) for i in present)

        def body(*parts: jax.Array) -> jax.Array:
            full: list[jax.Array | None] = [None] * len(args)
            for i, part in zip(present, parts, strict=True):
                full[i] = part
            return fn(*full)

        # Kernels know no mesh, so their constants are not marked as varying over it: that check must be off. Without it
        # the cotangent of an input is summed over the axes its layout leaves out, which is right as long as the output's
        # layout names every axis of more than one device.
        out = rules.spec(ROLES[output])
        mapped = jax.shard_map(body, mesh=rules.mesh, in_specs=specs, out_specs=out, check_vma=False)
        return mapped(*(args[i] for i in present))

    return run


def _spec(rules: Rules, role: str, arg: jax.Array) -> PartitionSpec:
    """The argument's layout; a dim of one (a single key head) is shared, not split."""
    axes = ROLES[role][: arg.ndim]
    return rules.spec(tuple(axis if size > 1 else None for axis, size in zip(axes, arg.shape, strict=True)))
