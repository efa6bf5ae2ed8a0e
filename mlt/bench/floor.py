"""The least an op must do, and the time this takes at a device's rates.

A floor is the largest of matrix FLOPs over the matrix rate, bytes over the copy rate and exponentials over the rate of
the special-function units, with every input read once and every output written once; causal halves count as halves.
No version runs much faster; a good one runs within 1.3 to 2 times of it.
"""

import dataclasses
import math
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one direction of a call must do."""

    flops: float = 0.0
    bytes: float = 0.0
    exps: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.exps + other.exps)


@dataclasses.dataclass(frozen=True)
class Rates:
    """Ceilings of a device, per second, and where they come from."""

    flops: float
    bytes: float
    exps: float
    source: str


KNOWN: dict[str, Rates] = {
    "H100": Rates(790e12, 3.0e12, 3.9e12, "H100 table: 790 TFLOP/s bf16, 3.0 TB/s copy"),
    "H200": Rates(790e12, 4.3e12, 3.9e12, "H200 table: 790 TFLOP/s bf16, 4.3 TB/s copy"),
    "B200": Rates(
        1700e12, 6.9e12, 4.4e12, "B200 table, three quarters and seven eighths of the data sheet's 2250 TFLOP/s and 7.7 TB/s"
    ),
}
"""Ceilings by a word of the device's name, for bf16. Those measured in the same run replace them."""


def rates_of(device_kind: str) -> Rates | None:
    """The table's entry for a device name, None if it has none."""
    return next((rates for word, rates in KNOWN.items() if word in device_kind), None)


def seconds(cost: Cost, rates: Rates) -> tuple[float, str]:
    """Floor and what bounds it: `matrix`, `memory` or `exp`."""
    parts = {"matrix": cost.flops / rates.flops, "memory": cost.bytes / rates.bytes, "exp": cost.exps / rates.exps}
    bound = max(parts, key=lambda name: parts[name])
    return parts[bound], bound


def nbytes(tree: Any) -> float:
    """Bytes of the arrays, or descriptions of arrays, of a tree."""
    leaves = (leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype") and leaf.dtype != jax.dtypes.float0)
    return float(sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves))


def traffic(arrays: dict[str, Any], result: Any, wrt: tuple[str, ...]) -> tuple[Cost, Cost]:
    """Bytes forward and backward when every array crosses the memory once: inputs, result; inputs, cotangents, gradients."""
    read = nbytes(arrays)
    return Cost(bytes=read + nbytes(result)), Cost(bytes=read + nbytes(result) + nbytes([arrays[name] for name in wrt]))


def linear_recurrence(
    *, tokens: int, heads: int, key_heads: int, K: int, V: int, C: int, rule: str, gate: str
) -> tuple[Cost, Cost]:
    """Chunks of C tokens: half the pairs of a chunk, the entering state read, the leaving state written."""
    if rule == "delta":
        flops = tokens * heads * (6 * K * V + C * (3 * K + 2 * V) + 2 * C * C / 3)
        exps = tokens * heads * (C if gate == "scalar" else 3 * K)
        return Cost(flops, exps=exps), Cost(2.2 * flops + tokens * heads * (4 * K * V + 1.5 * C * (K + V)), exps=2 * exps)
    flops = tokens * (heads * (C * V + 4 * K * V) + key_heads * C * K)
    exps = tokens * heads * (3 * K if gate == "vector" else C / 2)
    again = tokens * (key_heads * C * K + heads * 2 * K * V)  # scores and states, recomputed and not saved
    return Cost(flops, exps=exps), Cost(2 * flops + again, exps=2 * exps)


def attention(*, pairs: float, heads: int, H: int, P: int) -> tuple[Cost, Cost]:
    """`pairs` of a query and a key it sees, over all rows."""
    flops = 2 * pairs * heads * (H + P)
    return Cost(flops, exps=pairs * heads), Cost(2.5 * flops, exps=pairs * heads)


def gated_experts(*, rows: int, D: int, F: int) -> tuple[Cost, Cost]:
    """Gate, up and down products of sorted rows."""
    return Cost(6.0 * rows * D * F), Cost(12.0 * rows * D * F)


def cross_entropy(*, tokens: int, D: int, V: int) -> tuple[Cost, Cost]:
    """The backward recomputes the logits."""
    return Cost(2.0 * tokens * D * V, exps=float(tokens * V)), Cost(6.0 * tokens * D * V, exps=float(tokens * V))


def row_lookup(*, rows: int, D: int, out: int, item: int, pooled: bool) -> tuple[Cost, Cost]:
    """Rows touched, not the table: read; backward read for the weights, then read, added to and written."""
    touched = float(rows * D * item)
    written = float(out * D * item)
    return Cost(bytes=touched + written), Cost(bytes=(3.0 if pooled else 2.0) * touched + written)


def selective_scan(*, tokens: int, E: int, N: int) -> tuple[Cost, Cost]:
    """One exponential a token, channel and state, twice in the backward."""
    return Cost(exps=float(tokens * E * N)), Cost(exps=2.0 * tokens * E * N)
