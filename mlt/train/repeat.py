"""The same step twice: devices that compute something else the second time are found out.

The step's program donates its state, so the check copies the state first and gives both copies to that very program.
"""

import socket
from typing import Any

import jax
import numpy as np

from mlt.checkpoint.leaves import flatten
from mlt.errors import RunFailed
from mlt.train.distributed import anyone_says
from mlt.train.services import Services
from mlt.train.state import TrainState


def step_twice(
    step: int, step_fn: Any, state: TrainState, batch: Any, services: Services
) -> tuple[TrainState, dict[str, jax.Array]]:
    """What a step gives, after it gave the same twice.

    Raises:
        RunFailed: it gave something else the second time, here or on another process.
    """
    with services.goodput.during("check"):
        again = step_fn(copied(state), batch)
    result = step_fn(state, batch)
    with services.goodput.during("check"):
        lines = differences(result, again)
        if anyone_says(bool(lines)):
            where = "; ".join(lines) or "on another process, see its output"
            raise RunFailed(
                f"step {step} gave two results from one state and batch: {where}. Either a device computes wrongly or "
                f"this program is not deterministic on it. The checkpoints in {services.directory.checkpoints_path} are from "
                "before: go on from them on other machines, and test this one (on a GPU, rule the program out with "
                "XLA_FLAGS=--xla_gpu_deterministic_ops=true)"
            )
    services.console.say(f"step {step} was done twice: bit for bit the same")
    return result


def copied(tree: Any) -> Any:
    """A tree of arrays with buffers of their own, each where it was. Needs memory for the whole tree again."""

    def copy(array: jax.Array) -> jax.Array:
        shards = [jax.device_put(part.data, part.data.sharding, may_alias=False) for part in array.addressable_shards]
        return jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)

    return jax.tree.map(copy, tree)


def differences(first: Any, second: Any) -> list[str]:
    """Where two trees of like arrays differ by a bit: a line per device of this process, with the arrays and how many values."""
    found: dict[str, list[str]] = {}
    others = flatten(second)
    for path, array in flatten(first).items():
        for one, other in zip(array.addressable_shards, others[path].addressable_shards, strict=True):
            count = _different(np.asarray(one.data), np.asarray(other.data))
            if count:
                found.setdefault(str(one.device), []).append(f"{path} ({count} of {one.data.size} values)")
    return [f"{device} on {socket.gethostname()}: {_some(paths)}" for device, paths in found.items()]


def _different(one: np.ndarray, other: np.ndarray) -> int:
    unsigned = np.dtype(f"u{one.dtype.itemsize}")
    return int(np.count_nonzero(np.atleast_1d(one).view(unsigned) != np.atleast_1d(other).view(unsigned)))


def _some(paths: list[str]) -> str:
    return ", ".join(paths[:5]) + (f" and {len(paths) - 5} more arrays" if len(paths) > 5 else "")
