"""What every Triton backend shares: calls through jax-triton, the interpreter, and what is missing on this machine.

`triton` and `jax_triton` are imported when a kernel is first called. A kernel takes its input arrays, its numbers, its
output arrays and then its `tl.constexpr` options by name, each kind on lines of its own (`# fmt: skip` keeps them so). Triton
interprets kernels on a CPU if the process was started with TRITON_INTERPRET=1, which tests switch on:

    with triton_calls.interpret():
        causal_conv(..., implementation="triton_gpu")

Limits of jax-triton: its calls cannot be batched by `vmap`, and GSPMD does not split them (use `shard_map` with
`check_vma=False`).
"""

import contextlib
import contextvars
import importlib
import importlib.util
import inspect
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mlt_kernels import dispatch

PACKAGES = ("triton", "jax_triton")
ABSENT_GPU_CAPABILITY = 90
"""Compute capability that programs are lowered for where no GPU is at hand: an H100 or H200."""
INTERPRETER_VARIABLE = "TRITON_INTERPRET"

_interpreting: contextvars.ContextVar[bool] = contextvars.ContextVar("mlt_kernels_triton_interpreting", default=False)


def interpreting() -> bool:
    """Whether kernels traced now are to be interpreted."""
    return _interpreting.get()


@contextlib.contextmanager
def interpret(on: bool = True) -> Iterator[None]:
    """Kernels traced inside are interpreted on the CPU. A function jitted before keeps what it was traced with.

    Raises:
      RuntimeError: the process was not started for it: Triton decides when it is imported.
    """
    if on and not started_for_interpreter():
        raise RuntimeError(
            f"triton_calls.interpret: {INTERPRETER_VARIABLE}={os.environ.get(INTERPRETER_VARIABLE)!r}; expected '1', set "
            "before Triton is imported. Start Python again with it"
        )
    token = _interpreting.set(on)
    try:
        yield
    finally:
        _interpreting.reset(token)


def unsupported() -> str | None:
    """None if Triton kernels can be traced now, else the reason why not."""
    if not interpreting() and dispatch.platform() != "gpu":
        return f"its kernels are for gpu; planned for {dispatch.platform()} (only triton_calls.interpret() runs them there)"
    missing = [name for name in (PACKAGES[:1] if interpreting() else PACKAGES) if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed (pip install jax-triton triton, beside a jax for CUDA)"
    if started_for_interpreter() and not interpreting():
        return f"{INTERPRETER_VARIABLE}=1 is set: Triton compiles nothing in this process"
    return None


def started_for_interpreter() -> bool:
    """Whether Triton interprets kernels in this process, by the values of its variable that Triton takes for true."""
    return os.environ.get(INTERPRETER_VARIABLE, "0").lower() in ("1", "true", "on", "y", "yes")


def call(
    kernel: str,
    inputs: Sequence[Array | int],
    outputs: Sequence[jax.ShapeDtypeStruct],
    *,
    grid: tuple[int, ...],
    warps: int,
    stages: int = 1,
    **options: Any,
) -> list[Array]:
    """Runs a kernel over a grid.

    Args:
      kernel: "module:function", both of this package, so that the module is imported here and not before.
      inputs: arrays, then numbers; the kernel has a pointer for each array.
      outputs: shapes of the results; the kernel has a pointer for each behind the inputs.
      options: the kernel's `tl.constexpr` arguments.
    """
    module, name = kernel.split(":")
    function = getattr(importlib.import_module(f"{__package__}.{module}"), name)
    if interpreting():
        return _interpreted(function, inputs, outputs, grid, options)
    jax_triton = importlib.import_module("jax_triton")
    # jax-triton 0.4 took the name of `jax.ffi.ffi_call`.
    shapes = "out_type" if "out_type" in inspect.signature(jax_triton.triton_call).parameters else "out_shape"
    results = jax_triton.triton_call(
        *inputs,
        kernel=function,
        grid=grid,
        name=name,
        num_warps=warps,
        num_stages=stages,
        compute_capability=None if jax.default_backend() == "gpu" else ABSENT_GPU_CAPABILITY,
        **{shapes: tuple(outputs)},
        **options,
    )
    return list(results)


def nothing() -> Array:
    """Stands for an array that a kernel's options tell it not to read."""
    return jnp.zeros((1,), jnp.float32)


def _interpreted(
    function: Any, inputs: Sequence[Array | int], outputs: Sequence[jax.ShapeDtypeStruct], grid: Any, options: dict[str, Any]
) -> list[Array]:
    arrays = [x for x in inputs if not isinstance(x, int)]
    numbers = [x for x in inputs if isinstance(x, int)]

    def run(*given: Any) -> tuple[np.ndarray, ...]:
        results = [np.empty(out.shape, out.dtype) for out in outputs]
        for result in results:  # What a kernel forgets to write must be seen.
            result.fill(np.nan if jnp.issubdtype(result.dtype, jnp.floating) else -1)
        hosts = [HostArray(np.array(x)) for x in given] + numbers + [HostArray(x) for x in results]
        with warnings.catch_warnings():
            # Triton's interpreter makes loop bounds of arrays of one number.
            warnings.filterwarnings("ignore", message="Conversion of an array with ndim > 0", category=DeprecationWarning)
            function[grid](*hosts, **options)
        return tuple(results)

    return list(jax.pure_callback(run, tuple(outputs), *arrays))


class HostArray:
    """As much of a torch tensor as Triton's interpreter asks of its arguments, over a NumPy array."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self.dtype = f"torch.{array.dtype.name}"

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "HostArray":
        return self

    def cpu(self) -> "HostArray":
        return self

    def new_empty(self, *_: Any, **__: Any) -> "HostArray":
        return HostArray(np.empty((0,), self.array.dtype))

    def set_(self, storage: "HostArray", *_: Any) -> None:
        self.array = storage.array

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def copy_(self, _: "HostArray") -> None:
        """The interpreter worked in place."""
