"""Two runs compared: what they logged, the state they ended with and the batches they read. To the bit, or to a tolerance."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mlt.checkpoint.layout import read_leaves, read_record, step_path
from mlt.checkpoint.restore import restore
from mlt.run_paths import RunPaths

Numbers = dict[tuple[int, str], Any]
"""(step, metric) -> value."""

_COMPUTED = ("train/", "eval/")
_SHOWN = 5


def numbers(run_dir: Path) -> Numbers:
    """Every number that a run computed and logged; how long things took is left out.

    Raises:
        ValueError: a step was logged twice, and not alike.
    """
    found: Numbers = {}
    for row in rows(run_dir):
        for name, value in row.items():
            if name.startswith(_COMPUTED) and not name.endswith("seconds"):
                key = (row["step"], name)
                if found.setdefault(key, value) != value:
                    raise ValueError(f"{name} of step {key[0]} was logged twice: {found[key]!r} and {value!r}")
    return found


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """The whole rows of a run's metrics; a torn last one is left out."""
    try:
        lines = RunPaths(run_dir).metrics_path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if line.endswith(b"\n") and isinstance(row, dict) and "step" in row:
            found.append(row)
    return found


def arrays(checkpoints: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path in the state, on the host.

    Raises:
        CheckpointError: the step is missing or damaged.
    """
    leaves = read_leaves(checkpoints, step)
    target = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    return {path: np.asarray(array) for path, array in restore(checkpoints, target, step=step).state.items()}


def position(checkpoints: Path, step: int) -> dict[str, Any]:
    """Where a checkpoint stands in the data."""
    return read_record(step_path(checkpoints, step)).data


def unequal_arrays(expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> list[str]:
    """Paths of arrays that differ in a bit, in type or shape, or that one side lacks."""
    paths = dict.fromkeys([*expected, *found])
    return [path for path in paths if not _same_bits(expected.get(path), found.get(path))]


def unequal(expected: Mapping[Any, Any], found: Mapping[Any, Any]) -> list[str]:
    """`key: expected, found` of each value that differs or that one side lacks."""
    missing = object()
    keys = dict.fromkeys([*expected, *found])
    lines = []
    for key in keys:
        left, right = expected.get(key, missing), found.get(key, missing)
        if left is missing or right is missing or left != right:
            shown = ["nothing" if side is missing else repr(side) for side in (left, right)]
            lines.append(f"{_words(key)}: {shown[0]}, {shown[1]}")
    return lines


def relative_difference(expected: Numbers, found: Numbers, name: str) -> tuple[float, int]:
    """(largest relative difference of a metric over the steps that both have, how many these are)."""
    steps = [key for key in found if key[1] == name and key in expected]
    worst = max((abs(found[key] - expected[key]) / max(abs(expected[key]), 1e-30) for key in steps), default=0.0)
    return worst, len(steps)


def shown(lines: list[str]) -> str:
    """The first of many lines."""
    more = f", and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return "; ".join(lines[:_SHOWN]) + more


def _same_bits(left: np.ndarray | None, right: np.ndarray | None) -> bool:
    if left is None or right is None or left.dtype != right.dtype or left.shape != right.shape:
        return False
    return left.tobytes() == right.tobytes()


def _words(key: Any) -> str:
    return f"{key[1]} of step {key[0]}" if isinstance(key, tuple) else str(key)
