"""Eight simulated devices for every test, set up before jax is imported; and room for the programs of many tests.

Most of the suite's time would be the compiler's: programs are compiled without LLVM's optimization and with XLA's older, quicker
emitters, which changes no rule of arithmetic. What proves bits asks for the rest by name (`compile_options.py`), runs of the
command have it, and so has the whole suite with

    XLA_FLAGS=--xla_backend_optimization_level=3 python -m pytest

Tracing makes millions of objects that live on: the collector looks at them less often.
"""

import gc
import itertools
import os
import pathlib

import pytest
from compile_options import QUICK_FLAGS

os.environ["JAX_PLATFORMS"] = "cpu"
FLAGS = os.environ.get("XLA_FLAGS", "")
if "xla_backend_optimization_level" not in FLAGS:
    FLAGS = " ".join((FLAGS, *QUICK_FLAGS))
os.environ["XLA_FLAGS"] = FLAGS + " --xla_force_host_platform_device_count=8"
os.environ["WANDB_MODE"] = "offline"

gc.set_threshold(200_000, 20, 100)

MAPS = pathlib.Path("/proc/self/maps")
MANY_MAPS = 25_000
LOOK_EVERY = 8  # tests: looking takes some milliseconds

tests_run = itertools.count(1)


@pytest.fixture(autouse=True)
def few_memory_maps():
    """Every program that XLA compiles for the CPU maps memory, and Linux ends a process that has 65,530 maps."""
    yield
    if next(tests_run) % LOOK_EVERY == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY_MAPS:
        import jax  # not before the environment is set

        jax.clear_caches()
        gc.collect()
