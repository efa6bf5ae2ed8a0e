"""The one place that knows tokamax: its attention and ragged product on Hopper and Blackwell GPUs.

tokamax is optional (`pip install tokamax`: Python 3.12 and JAX 0.11.1 or later) and imported when a call is first planned.
Its Mosaic kernels take bfloat16 and float16. Key ranges of queries, which make packed documents cheap, are in its attention op
but not yet in its public function, hence the import from its inside; a version without them is a reason, not an error.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from mlt_kernels import dispatch
from mlt_kernels.refusals import first_line, refusal

IMPLEMENTATION = "mosaic_gpu"
"""Name in tokamax's tables; tests put `xla` there, the same function in portable form."""
INSTALL = "pip install tokamax; Python 3.12 or later"


def unsupported(dtype: Any) -> str | None:
    """None if its kernels can be traced now for arrays of `dtype`, else the reason why not."""
    if dispatch.platform() != "gpu":
        return f"tokamax's kernels are for gpu; planned for {dispatch.platform()}"
    if importlib.util.find_spec("tokamax") is None:
        return f"tokamax not installed ({INSTALL})"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"inputs of {jnp.dtype(dtype).name}; tokamax's kernels take bfloat16 and float16"
    return None


def refused(fn: Callable[..., Any], arrays: tuple[Any, ...], *others: Any) -> str | None:
    """What tokamax itself says of `fn(*arrays, *others)` and its gradients in `arrays`, e.g. of the GPU present; else None."""
    error = refusal(fn, arrays, *others, errors=(ImportError, NotImplementedError, ValueError))
    if isinstance(error, ImportError):
        return f"this version of tokamax is not the one known here: {first_line(error)}"
    return None if error is None else f"tokamax refuses it: {first_line(error)}"


def attention(
    q: Array, k: Array, v: Array, *, scale: float, softcap: float | None, causal: bool, first: Array | None, end: Array | None
) -> Array:
    """Query t sees the keys from first[t] (B or 1, T) to end[t], exclusive, and if `causal` none after t."""
    base = importlib.import_module("tokamax._src.ops.attention.base")
    table = importlib.import_module("tokamax._src.ops.attention.api").IMPLEMENTATIONS
    one_head = [None if x is None else x[:, None] for x in (first, end)]
    mask = base.Mask(is_causal=causal, k_start=one_head[0], k_end=one_head[1])
    return table[IMPLEMENTATION](q, k, v, logits_scale=scale, logits_soft_cap=softcap, mask=mask)


def ragged_dot(lhs: Array, rhs: Array, group_sizes: Array) -> Array:
    """As `jax.lax.ragged_dot`, but what stands in rows of no group is undefined."""
    return importlib.import_module("tokamax").ragged_dot(lhs, rhs, group_sizes, implementation=IMPLEMENTATION)
