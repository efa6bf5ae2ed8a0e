"""What the wrappers of the Triton kernels share."""

from typing import NamedTuple

from mlt_kernels import tuned
from mlt_kernels.linear_recurrence._kernel_inputs import ANCHOR, INTERPRETED_ANCHOR, OF_VALUES


class Settings(NamedTuple):
    """What does not change with the numbers of a call."""

    scale: float
    chunk: int
    stride: int | None  # chunks between two returned states
    gated: bool  # write strengths have a gradient
    interpret: bool

    @property
    def anchor(self) -> int:
        """Chunks between two states that are left for the decays' gradients; the same where states are returned."""
        return self.stride or (INTERPRETED_ANCHOR if self.interpret else ANCHOR)


class Sizes(NamedTuple):
    """Block sizes of one kernel: its part of K and V, warps and pipeline stages."""

    keys: int
    values: int
    warps: int
    stages: int


def measured(kernel: str, K: int, V: int, item_bytes: int, rule: Sizes, *, vector: bool) -> Sizes:
    """What was measured on the device in place of the rule's choice, which serves every GPU."""
    names = tuned.KERNELS["linear_recurrence", "triton_gpu"][kernel].sizes
    shape = {"K": K, "V": V, "item_bytes": item_bytes, "vector": vector}
    given = {name: getattr(rule, name) for name in names}
    return rule._replace(**tuned.sizes("linear_recurrence", "triton_gpu", kernel, shape, given))


def power_of_two(dim: int) -> int:
    """The width of the tile that holds a dim: products need 16."""
    return max(16, 1 << (dim - 1).bit_length())


def slabs_of(at: Sizes, kernel: str, K: int, V: int) -> int:
    """Programs that share the state of one head."""
    return -(-V // at.values) if kernel in OF_VALUES else -(-K // at.keys)
