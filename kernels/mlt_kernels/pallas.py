"""What every Pallas backend shares: interpret mode, compiler parameters and the differences between JAX versions.

Kernels that `jax.experimental.pallas.triton` compiles are called Triton kernels here, those for a TPU Mosaic kernels.
Both run on a CPU in interpret mode, which tests switch on:

    with pallas.interpret():
        linear_recurrence(..., implementation="pallas_gpu")
"""

import contextlib
import contextvars
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import jax

from mlt_kernels import dispatch

_interpreting: contextvars.ContextVar[bool] = contextvars.ContextVar("mlt_kernels_interpreting", default=False)


def interpreting() -> bool:
    """Whether kernels traced now are to be interpreted."""
    return _interpreting.get()


@contextlib.contextmanager
def interpret() -> Iterator[None]:
    """Kernels traced inside are interpreted, on any platform. A function jitted before keeps what it was traced with."""
    token = _interpreting.set(True)
    try:
        yield
    finally:
        _interpreting.reset(token)


def unsupported_platform(platform: str) -> str | None:
    """None if kernels for `platform` ("gpu" or "tpu") can be traced now, else the reason why not."""
    if interpreting() or dispatch.platform() == platform:
        return None
    return f"its kernels are for {platform}; planned for {dispatch.platform()} (only pallas.interpret() runs them there)"


def triton_params(*, num_warps: int, num_stages: int) -> Any:
    """Compiler parameters of a Triton kernel.

    Also silences the warning of JAX 0.11 and later that Pallas Triton is deprecated: JAX gives it when the kernel is
    lowered, after our code has returned, so it cannot be caught around a call. The filter knows it by its text.
    """
    from jax.experimental.pallas import triton

    warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning)
    return triton.CompilerParams(num_warps=num_warps, num_stages=num_stages)


def tpu_params(*, dimension_semantics: tuple[Literal["parallel", "arbitrary"], ...], vmem_limit_bytes: int | None = None) -> Any:
    """Compiler parameters of a Mosaic kernel."""
    from jax.experimental.pallas import tpu

    return tpu.CompilerParams(dimension_semantics=dimension_semantics, vmem_limit_bytes=vmem_limit_bytes)


def device_kind() -> str:
    """Name of the accelerator that kernels traced now will run on; empty if it is not known (a CPU host)."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None:
        return device.device_kind
    present = jax.devices()[0]
    return "" if present.platform == "cpu" else present.device_kind


@contextlib.contextmanager
def target_device(kind: str = "NVIDIA H200", *, platform: str = "gpu", cores: int = 132) -> Iterator[None]:
    """Plans, traces and lowers for a device that is not there: JAX 0.11 and later must be told its name.

    with pallas.target_device():
        jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",))
    """
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=cores, platform=platform)
    mesh = jax.sharding.AbstractMesh((1,), ("_",), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=device)
    with dispatch.target_platform(platform), jax.sharding.use_abstract_mesh(mesh):
        yield
