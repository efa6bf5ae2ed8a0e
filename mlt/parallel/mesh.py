"""Mesh axes, their degrees, and the mesh they make of the devices at hand."""

import math
from collections.abc import Iterator
from typing import Literal

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from mlt.config.base import Config
from mlt.config.problems import Problem
from mlt.errors import UserError
from mlt.parallel.carry import Exchange
from mlt.parallel.crossings import Strategy
from mlt.parallel.devices import arrange
from mlt.parallel.rules import Rules

AXES = ("replica", "fsdp", "expert", "context", "tensor")
"""Slowest links first, so that tensor shards sit on neighbouring devices."""


class Layout(Config):
    """Shards along each mesh axis; their product is the number of devices.

    Attributes:
        replica: copies of everything; gradients are averaged over them.
        fsdp: parameters, gradients and optimizer state split; also splits the batch.
        context: the sequence split.
        tensor: heads, hidden units and the vocabulary split.
        expert: experts split; also splits the batch.
        carry: how states of recurrences cross sequence shards: "gather", "permute" or "ring" (`parallel/carry.py`).
        attention: what of attention crosses sequence shards: "gather", "window", "ring", "zigzag" or "heads"
            (`parallel/crossings.py`); None takes, for each layer, what moves least.
        zero: what `fsdp` splits (ZeRO, arXiv 1910.02054): 3 parameters, gradients and optimizer state; 2 gradients and
            optimizer state; 1 the optimizer state alone.
    """

    replica: int = 1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1
    carry: Exchange = "gather"
    attention: Strategy | None = None
    zero: Literal[1, 2, 3] = 3

    @property
    def num_devices(self) -> int:
        return math.prod(getattr(self, axis) for axis in AXES)

    @property
    def batch_shards(self) -> int:
        return self.replica * self.fsdp * self.expert

    def problems(self) -> Iterator[Problem]:
        for axis in AXES:
            if getattr(self, axis) < 1:
                yield Problem(axis, getattr(self, axis), "must be at least 1")

    def shape(self) -> dict[str, int]:
        return {axis: getattr(self, axis) for axis in AXES}

    def abstract(self) -> AbstractMesh:
        """The mesh without devices, for plans and lowering."""
        kinds = (AxisType.Auto,) * len(AXES)
        return AbstractMesh(tuple(self.shape().values()), AXES, axis_types=kinds)

    def rules(self, devices: list[jax.Device] | None = None) -> Rules:
        """The layout on real devices (default: all there are).

        Raises:
            UserError: the product of the degrees is not the number of devices.
        """
        return Rules(self.build(devices), carry=self.carry, attention=self.attention, zero=self.zero)

    def abstract_rules(self) -> Rules:
        """The layout on a mesh without devices."""
        return Rules(self.abstract(), carry=self.carry, attention=self.attention, zero=self.zero)

    def build(self, devices: list[jax.Device] | None = None) -> Mesh:
        """The mesh over `devices` (default: all there are).

        Raises:
            UserError: the product of the degrees is not the number of devices.
        """
        devices = jax.devices() if devices is None else devices
        if self.num_devices != len(devices):
            degrees = " * ".join(f"{axis}={n}" for axis, n in self.shape().items() if n > 1) or "every axis 1"
            raise UserError(
                f"mesh: {degrees} makes {self.num_devices} devices, but {len(devices)} {devices[0].platform} device(s) "
                f"are here; the product must equal {len(devices)}, for instance --set mesh.fsdp={len(devices)}"
            )
        kinds = (AxisType.Auto,) * len(AXES)
        return Mesh(arrange(devices, self.shape()), AXES, axis_types=kinds)
