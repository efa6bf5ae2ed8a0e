"""What the wrappers of the Triton kernels share."""

from typing import NamedTuple

ANCHOR = 16
"""Chunks between two states that are left for the decays' gradients."""
OF_VALUES = ("forward", "values")
"""Kernels whose programs own a slab of V and all of K; `queries` and `keys` own a slab of K and all of V."""


class Settings(NamedTuple):
    """What does not change with the numbers of a call."""

    scale: float
    chunk: int
    stride: int | None  # chunks between two returned states
    gated: bool  # write strengths have a gradient
    interpret: bool

    @property
    def anchor(self) -> int:
        return self.stride or (2 if self.interpret else ANCHOR)


class Sizes(NamedTuple):
    """Block sizes of one kernel: its part of K and V, warps and pipeline stages."""

    keys: int
    values: int
    warps: int
    stages: int


def power_of_two(dim: int) -> int:
    """The width of the tile that holds a dim: products need 16."""
    return max(16, 1 << (dim - 1).bit_length())


def slabs_of(at: Sizes, kernel: str, K: int, V: int) -> int:
    """Programs that share the state of one head."""
    return -(-V // at.values) if kernel in OF_VALUES else -(-K // at.keys)
