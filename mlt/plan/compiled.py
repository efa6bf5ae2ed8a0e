"""The step compiled for GPUs that are not here, by the compiler that would compile it there: its own memory and collectives.

It needs the CUDA plugin of JAX (`pip install 'mlt[gpu]'`), and no GPU, driver or toolkit.
"""

import dataclasses
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
from mlt_kernels import dispatch

from mlt.config.run import RunConfig
from mlt.errors import UserError
from mlt.parallel.mesh import AXES
from mlt.parallel.rules import Rules
from mlt.plan.collectives import Collective, collectives
from mlt.plan.devices import Accelerator, Pool
from mlt.plan.forecast import batch_fields
from mlt.train.residents import on_devices
from mlt.train.setup import build_optimizer, describe_model, step_options
from mlt.train.state import abstract_batch, abstract_state
from mlt.train.step import jit_train_step

HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {copy:.0f} l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: {memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "NVIDIA {name}"
"""
"""What the driver of an H100 or H200 reports; they differ in their memory."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler allots on one device, in bytes, and what the program sends.

    Attributes:
        arguments: state and batch.
        temporary: everything else at its fullest moment, as the allocator packs it.
        seconds: that compiling took.
    """

    arguments: int
    temporary: int
    sent: tuple[Collective, ...]
    seconds: float


def compile_step(config: RunConfig, pool: Pool) -> Compiled:
    """Compiles the train step of a checked config; its mesh has as many devices as the pool.

    Raises:
        UserError: another kind of device than H100 or H200, no plugin, or tables in host memory.
    """
    rules = Rules(_mesh(config, pool), carry=config.mesh.carry, attention=config.mesh.attention, zero=config.mesh.zero)
    whole = describe_model(config)
    specs = on_devices(config, whole)
    optimizer = build_optimizer(config, specs)
    state = abstract_state(specs, optimizer, rules)
    batch = abstract_batch(rules, config.data.batch_size, config.data.sequence_length, batch_fields(config, whole, 1))
    started = time.perf_counter()
    with dispatch.target_platform("gpu"):
        step = jit_train_step(state, optimizer, step_options(config, rules, specs)).trace(state, batch).lower()
    program = step.compile()
    memory: Any = program.memory_analysis()
    return Compiled(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        tuple(collectives(program.as_text())),
        time.perf_counter() - started,
    )


def _mesh(config: RunConfig, pool: Pool) -> Mesh:
    device: Accelerator = pool.device
    if device.name not in ("H100", "H200"):
        raise UserError(f"--compile knows H100 and H200, not {device.name}; leave it out, the plan without it knows them all")
    near = min(pool.count, device.near)
    if pool.count % near:
        raise UserError(f"--compile needs whole hosts of {device.near} devices, and --devices names {pool.count}")
    described = HOPPER.format(copy=device.copy, memory=device.memory, name=device.name)
    try:
        topology = topologies.get_topology_desc(
            device.name.lower(), platform="cuda", target_config=described, topology=f"1x{pool.count // near}x{near}"
        )
    except Exception as error:
        found = next((line for line in str(error).splitlines() if line), type(error).__name__)
        raise UserError(
            f"--compile needs the CUDA plugin of JAX {jax.__version__}, and no GPU: pip install 'mlt[gpu]' ({found[:200]})"
        ) from None
    devices = np.asarray(topology.devices).reshape(tuple(config.mesh.shape().values()))
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))
