"""Which process holds which rows of a table in host memory, and how its arrays become arrays of the whole run.

The devices that share a table's rows, one for each step along `mesh.fsdp`, lie in some processes. Processes whose devices hold
the same rows hold the same *part* of every table in host memory, the rows that these devices would hold if the table lay on
them; all parts together are the table. So what a step reads and writes for a process's devices is in that process's memory, and
no row of a table in host memory ever travels between hosts. With one process, or copies (`mesh.replica`) on each, there is one
part, the whole.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlt.errors import UserError
from mlt.parallel.rules import Rules
from mlt.parallel.table import AXES


@dataclasses.dataclass(frozen=True)
class Parts:
    """Attributes:
    holders: processes of each part, ascending.
    own: the part of this process.
    """

    holders: tuple[tuple[int, ...], ...]
    own: int

    @property
    def count(self) -> int:
        return len(self.holders)

    def sharding(self, num_dims: int, rows_dim: int) -> NamedSharding:
        """Of an array of a table's rows in host memory: each process has its part, on its first CPU device.

        Args:
            num_dims: of the array.
            rows_dim: the dim of the rows.
        """
        first: dict[int, jax.Device] = {}
        for device in sorted(jax.devices("cpu"), key=lambda device: device.id):
            first.setdefault(device.process_index, device)
        devices = np.array([[first[process] for process in holders] for holders in self.holders])
        spec = ("part" if dim == rows_dim else None for dim in range(num_dims))
        return NamedSharding(Mesh(devices, ("part", "copy")), PartitionSpec(*spec))


def parts_of(rules: Rules) -> Parts:
    """The parts of a run's tables in host memory.

    Raises:
        UserError: devices of one process hold rows that do not follow each other, or some that others hold in part.
    """
    if not isinstance(rules.mesh, Mesh):
        return Parts(((0,),), 0)
    owners, held = rules.size("memory"), {}
    sharding = NamedSharding(rules.mesh, rules.spec(("memory",)))
    for device, (rows,) in sharding.devices_indices_map((owners,)).items():
        held.setdefault(device.process_index, set()).update(range(*rows.indices(owners)))
    groups: dict[tuple[int, ...], list[int]] = {}
    for process in sorted(held):
        groups.setdefault(tuple(sorted(held[process])), []).append(process)
    size, shared = owners // len(groups), {len(processes) for processes in groups.values()}
    if sorted(groups) != [tuple(range(i * size, (i + 1) * size)) for i in range(len(groups))] or len(shared) > 1:
        raise UserError(
            f"tables in host memory need processes whose devices hold equal runs of the mesh.fsdp = {owners} owners; here "
            + ", ".join(f"process {process} has owners {sorted(rows)}" for process, rows in sorted(held.items()))
            + ". Use another mesh, or table_on='device'"
        )
    holders = [tuple(groups[rows]) for rows in sorted(groups)]
    return Parts(tuple(holders), next(i for i, own in enumerate(holders) if jax.process_index() in own))


def part_of(array: jax.Array, dim: int, start: int, stop: int) -> np.ndarray:
    """A copy of [start, stop) along a dim, of an array of which this process's devices hold that much."""
    found = np.empty([stop - start if i == dim else size for i, size in enumerate(array.shape)], array.dtype)
    done = set()
    for shard in array.addressable_shards:
        first, last, _ = shard.index[dim].indices(array.shape[dim])
        low, high = max(first, start), min(last, stop)
        if low < high and (low, high) not in done:
            done.add((low, high))
            found[_along(array.ndim, dim, low - start, high - start)] = np.asarray(shard.data)[
                _along(array.ndim, dim, low - first, high - first)
            ]
    return found


def whole_from(own: np.ndarray, shape: tuple[int, ...], dim: int, start: int, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array of all processes, of which each gives what its devices hold: [start, start + its size) along a dim."""
    if sharding.is_fully_addressable:
        return jax.device_put(own, sharding)

    def part(index: tuple[slice, ...]) -> np.ndarray:
        first, last, _ = index[dim].indices(shape[dim])
        return own[_along(len(shape), dim, first - start, last - start)]

    return jax.make_array_from_callback(shape, sharding, part)


def within_part(rules: Rules, parts: int) -> tuple[Callable[[], Any], Callable[[jax.Array, int], jax.Array]]:
    """What a device may ask inside `shard_map`: which part it belongs to, and (its rows, their dim) -> those of its part.

    Args:
        parts: runs of owners, of equal size.
    """
    owners = rules.size("memory")
    size = owners // parts
    if size <= 1:
        return (lambda: jax.lax.axis_index(AXES) if owners > 1 else 0), lambda rows, dim: rows
    groups = [list(range(i * size, (i + 1) * size)) for i in range(parts)] if parts > 1 else None
    gather = functools.partial(jax.lax.all_gather, axis_name=AXES, axis_index_groups=groups, tiled=True)
    return (lambda: jax.lax.axis_index(AXES) // size), lambda rows, dim: gather(rows, axis=dim)


def _along(num_dims: int, dim: int, start: int, stop: int) -> tuple[slice, ...]:
    return tuple(slice(start, stop) if i == dim else slice(None) for i in range(num_dims))
