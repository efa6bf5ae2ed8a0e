"""Fast axes inside a machine, slow ones across machines, in whatever order the devices come."""

import dataclasses
import random

import numpy as np
import pytest

from mlt.parallel.devices import arrange, split_axes


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a device as its place in a mesh depends on."""

    id: int
    process_index: int
    slice_index: int = 0
    platform: str = "cuda"


def machines(count: int, each: int, *, slices: int = 1) -> list[Device]:
    """Shuffled devices; neighbouring process numbers lie in different slices."""
    devices = [Device(machine * each + i, machine, machine % slices) for machine in range(count) for i in range(each)]
    random.Random(0).shuffle(devices)
    return devices


@pytest.mark.parametrize(
    ("sizes", "between"),
    [
        ({"replica": 4, "fsdp": 1, "context": 2, "tensor": 4}, ("replica",)),
        ({"replica": 1, "fsdp": 8, "context": 1, "tensor": 4}, ("fsdp",)),
        ({"replica": 2, "fsdp": 2, "context": 2, "tensor": 4}, ("replica", "fsdp")),
        ({"replica": 1, "fsdp": 2, "context": 2, "tensor": 8}, ("fsdp", "context")),
    ],
)
def test_slow_axes_cross_machines(sizes, between):
    devices = machines(4, 8)
    mesh = arrange(devices, sizes)
    assert mesh.shape == tuple(sizes.values())
    assert set(mesh.flat) == set(devices)
    assert split_axes(mesh, list(sizes)) == between


def test_machines_of_one_fast_network_are_neighbours():
    mesh = arrange(machines(4, 2, slices=2), {"replica": 2, "fsdp": 4})
    networks = np.vectorize(lambda device: device.slice_index)(mesh)
    np.testing.assert_array_equal(networks, [[0] * 4, [1] * 4])
