"""Memory of devices, as far as they say how much they have, and what arrays take of it."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import jax

_GROWING = ("platform", "cuda_async", "cuda-async")
"""Allocators of XLA that may hand out more than the limit they report, or report none."""


def machine_bytes() -> int:
    """Bytes of this machine, or of the part of it that this process may use (control groups, version 2)."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        allowed = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return whole
    return min(whole, int(allowed)) if allowed.isdigit() else whole


def device_limit(devices: Sequence[jax.Device]) -> int | None:
    """The least that one of a mesh's devices in this process may hold; None where none is known.

    CPU devices share the machine's memory.
    """
    if devices and devices[0].platform == "cpu":
        return machine_bytes() // len(devices)
    return min((size for size in map(_limit, devices) if size), default=None)


def bytes_on_device(leaf: jax.ShapeDtypeStruct) -> int:
    """What one device holds of an array that is described with its sharding."""
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return leaf.dtype.itemsize * math.prod(shape)


def _limit(device: jax.Device) -> int | None:
    if os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR", "").lower() in _GROWING:
        return None
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except (NotImplementedError, RuntimeError):  # a plugin that keeps no account
        return None
