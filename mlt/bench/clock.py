"""Time of calls: processor time of one pinned core on a CPU, a queue of calls on an accelerator.

A CPU shared with other work gives wall times that say nothing, so there the processor time of this process counts, on
one core, and only ratios of times taken in turns are worth printing. An accelerator runs what it is handed in order:
K calls are queued and their time is divided by K, over inputs that change from call to call and together exceed the
cache.
"""

import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

Call = Callable[[], Any]
"""One call with its inputs bound; returns what `wait` of its framework takes."""

_ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd", "/dev/accel0", "/dev/vfio/0")


def pin() -> int | None:
    """Keeps this process on its last core, unless JAX or torch has begun or an accelerator is present. The core, or None.

    Thread pools take their size from the affinity they find, so this must come before the first import of either.
    """
    started = "jax" in sys.modules or "torch" in sys.modules
    accelerated = os.environ.get("JAX_PLATFORMS", "") != "cpu" and any(pathlib.Path(p).exists() for p in _ACCELERATORS)
    if started or accelerated or not hasattr(os, "sched_setaffinity"):
        return None
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    return core


def processor_seconds(call: Call, wait: Callable[[Any], Any]) -> float:
    """Processor seconds of one call."""
    started = time.process_time()
    wait(call())
    return time.process_time() - started


def alternate(calls: Sequence[Call], waits: Sequence[Callable[[Any], Any]], *, repeats: int) -> list[float]:
    """Least processor seconds of each call over `repeats` turns. The order turns with every repeat."""
    best = [float("inf")] * len(calls)
    for repeat in range(repeats):
        order = range(len(calls)) if repeat % 2 == 0 else reversed(range(len(calls)))
        for i in order:
            best[i] = min(best[i], processor_seconds(calls[i], waits[i]))
    return best


def queued_seconds(calls: Sequence[Call], wait: Callable[[Any], Any], *, repeats: int = 20, queue: int = 8) -> float:
    """Median over `repeats` of the wall seconds of one call among `queue` that go to the device without waiting.

    `calls` differ in their inputs and take turns, so that none finds its inputs in the cache.
    """
    taken = []
    turn = 0
    for _ in range(repeats):
        started = time.perf_counter()
        result = None
        for _ in range(queue):
            result = calls[turn % len(calls)]()
            turn += 1
        wait(result)
        taken.append((time.perf_counter() - started) / queue)
    return statistics.median(taken)
