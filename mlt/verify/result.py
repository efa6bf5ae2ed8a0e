"""What a proof says."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Result:
    """Attributes:
    name: of the proof.
    passed: whether it holds.
    facts: one line with its figures.
    """

    name: str
    passed: bool
    facts: str


def largest_difference(a: np.ndarray, b: np.ndarray) -> float:
    """max |a - b| over the root mean square of a."""
    scale = float(np.sqrt(np.mean(np.square(a, dtype=np.float64)))) or 1.0
    return float(np.max(np.abs(a.astype(np.float64) - b), initial=0.0)) / scale
