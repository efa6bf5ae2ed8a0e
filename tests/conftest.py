"""Eight simulated devices for every test, set up before jax is imported; and room for the programs of many tests.

Most of the suite's time would be LLVM's: programs are compiled without its optimization, which changes no rule of
arithmetic. What proves bits asks for it by name (`tests/mixers/test_conformance.py`), runs of the command have it, and so
has the whole suite with

    XLA_FLAGS=--xla_backend_optimization_level=3 python -m pytest
"""

import gc
import itertools
import os
import pathlib

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
FLAGS = os.environ.get("XLA_FLAGS", "")
if "xla_backend_optimization_level" not in FLAGS:
    FLAGS += " --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = FLAGS + " --xla_force_host_platform_device_count=8"
os.environ["WANDB_MODE"] = "offline"

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
