"""The order of devices in a mesh: fast axes inside a machine, slow ones across machines."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils


def arrange(devices: Sequence[jax.Device], sizes: Mapping[str, int]) -> np.ndarray:
    """Devices as an array with one dim per mesh axis, for `jax.sharding.Mesh`.

    Devices are taken machine after machine, and machines of one fast network (a TPU slice, an NVLink domain) one after
    the other; the array is filled with the last axis running fastest. So the last axes, `tensor` and `context`, lie
    inside a machine where they fit, and the first, `replica` and `fsdp`, span the slow links. On TPUs the devices of a
    slice are in the order of their torus besides.

    Args:
        devices: as many as the sizes make.
        sizes: mesh axis -> shards, slowest links first.
    """
    shape = tuple(sizes.values())
    if devices[0].platform == "tpu":
        return _on_torus(devices, shape)
    return np.array(sorted(devices, key=_place)).reshape(shape)


def split_axes(mesh_devices: np.ndarray, names: Sequence[str]) -> tuple[str, ...]:
    """Axes of a mesh along which neighbours lie on different machines: what crosses the slow links."""
    crossing = []
    for dim, name in enumerate(names):
        machines = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh_devices)
        if np.any(np.diff(machines, axis=dim)):
            crossing.append(name)
    return tuple(crossing)


def _place(device: jax.Device) -> tuple[int, int, int]:
    """Network, machine and number of a device."""
    return getattr(device, "slice_index", None) or 0, device.process_index, device.id


def _on_torus(devices: Sequence[jax.Device], shape: tuple[int, ...]) -> np.ndarray:
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices)
    outer, left = [], slices
    for size in shape:
        factor = int(np.gcd(size, left))
        outer.append(factor)
        left //= factor
    if left > 1:
        return np.array(sorted(devices, key=_place)).reshape(shape)
    inner = [size // factor for size, factor in zip(shape, outer, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices)
