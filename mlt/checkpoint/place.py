"""Read the arrays of a step onto the devices, each process its own parts, a few arrays at a time.

Host memory beside the restored arrays themselves (which lie there only on CPU): IN_FLIGHT_BYTES, or the largest part of
one array on one device where that is larger, twice where the type is changed; plus a few pieces of PIECE_BYTES.
"""

import concurrent.futures
import contextlib
import math
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from mlt.checkpoint.arrays import StoredArrays
from mlt.checkpoint.layout import StepFiles
from mlt.checkpoint.leaves import Leaf, is_key

IN_FLIGHT_BYTES = 64 << 20
_READERS = 4


class Placed(NamedTuple):
    """Attributes:
    arrays: path -> array, as its target says.
    digests: path -> this process's share of the digest of what is stored; shares of all processes add up.
    """

    arrays: dict[str, jax.Array]
    digests: dict[str, int]


def place_arrays(files: StepFiles, saved: Mapping[str, Leaf], targets: Mapping[str, jax.ShapeDtypeStruct]) -> Placed:
    """Read arrays; involves no other process.

    Args:
      files: of the step.
      saved: its table of leaves.
      targets: path -> shape, type and sharding, keys as their uint32 data. A floating array of another type than the
        stored one is rounded to it.

    Raises:
      CheckpointError: an array cannot be read.
    """
    stored, budget = StoredArrays(files), _Budget(IN_FLIGHT_BYTES)
    # The largest first: small ones fill what is left of the budget.
    order = sorted(targets, key=lambda name: -math.prod(targets[name].shape))
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        running = {name: pool.submit(_place, stored, name, saved[name], targets[name], budget) for name in order}
        try:
            done = {name: running[name].result() for name in targets}
        finally:
            for future in running.values():
                future.cancel()
    return Placed({name: array for name, (array, _) in done.items()}, {name: digest for name, (_, digest) in done.items()})


def stored_form(leaf: Any) -> jax.ShapeDtypeStruct:
    """The target of one leaf as it is stored: PRNG keys as their uint32 data, the sharding always given."""
    sharding = leaf.sharding
    if sharding is None:
        if jax.process_count() > 1:
            raise ValueError("a target without sharding cannot be restored in a run of several processes")
        sharding = SingleDeviceSharding(jax.devices()[0])
    if not is_key(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    bits = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return jax.ShapeDtypeStruct(bits.shape, bits.dtype, sharding=_with_trailing_dim(sharding, len(leaf.shape)))


def _place(stored: StoredArrays, name: str, leaf: Leaf, target: jax.ShapeDtypeStruct, budget: "_Budget") -> tuple[jax.Array, int]:
    """One array, and this process's share of its digest: each part that several devices hold is counted once."""
    sharding, shape = target.sharding, target.shape
    memory = {"memory_kind": sharding.memory_kind} if sharding.memory_kind else {}
    boxes: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        box = tuple((part.start or 0, size if part.stop is None else part.stop) for part, size in zip(index, shape, strict=True))
        boxes.setdefault(box, []).append(device)
    array = stored.open(name, leaf) if math.prod(shape) else None
    shards, digests = {}, {}
    for box, devices in boxes.items():
        sizes = [stop - start for start, stop in box]
        with budget.of(math.prod(sizes) * target.dtype.itemsize):
            if array is None:
                values, digests[box] = np.zeros(sizes, target.dtype), 0
            else:
                values, digests[box] = stored.read(name, array, box)
            values = values.astype(target.dtype, copy=False)
            for device in devices:
                where = SingleDeviceSharding(device, **memory)
                shards[device] = jax.device_put(values, where, may_alias=False)
            jax.block_until_ready([shards[device] for device in devices])
            del values
    result = jax.make_array_from_single_device_arrays(shape, sharding, list(shards.values()), dtype=target.dtype)
    first = {box for box, devices in boxes.items() if not _copied_elsewhere(result, devices)}
    return result, sum(digest for box, digest in digests.items() if box in first)


def _copied_elsewhere(array: jax.Array, devices: list[jax.Device]) -> bool:
    """Whether another process counts the part that these devices hold."""
    return not any(shard.replica_id == 0 for shard in array.addressable_shards if shard.device in devices)


def _with_trailing_dim(sharding: Sharding, ndim: int) -> Sharding:
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = (*sharding.spec, *(None,) * (ndim - len(sharding.spec)), None)
    return NamedSharding(sharding.mesh, PartitionSpec(*spec), memory_kind=sharding.memory_kind)


class _Budget:
    """Lets readers in as long as they hold no more bytes together than a limit; one that is larger comes alone."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used, self._changed = limit, 0, threading.Condition()

    @contextlib.contextmanager
    def of(self, size: int) -> Iterator[None]:
        size = min(size, self._limit)
        with self._changed:
            self._changed.wait_for(lambda: self._used + size <= self._limit)
            self._used += size
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                self._changed.notify_all()
