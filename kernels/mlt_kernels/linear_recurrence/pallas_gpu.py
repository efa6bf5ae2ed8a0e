"""GPU kernels in Pallas-Triton: `_pallas_add` for the add rule, `_pallas_delta` for the delta rule.

Status: numbers checked in interpret mode, programs lowered and compiled for an H200; not run on a GPU.
"""

import functools
from typing import Any

from jax import Array

from mlt_kernels import pallas
from mlt_kernels.linear_recurrence import _pallas_add, _pallas_delta, reference

RULES = {"add": _pallas_add, "delta": _pallas_delta}
"""Modules with `unsupported` and `run`."""


def unsupported(*, rule: str, v: Array, **arguments: Any) -> str | None:
    reason = pallas.unsupported_platform("gpu")
    if reason is None and 0 in v.shape:
        reason = f"v has shape {v.shape}: nothing to compute"
    return reason or RULES[rule].unsupported(rule=rule, v=v, **arguments)


@functools.wraps(reference.run)  # for its signature, the same of every backend
def run(*, rule: str, **arguments: Any) -> Any:
    return RULES[rule].run(rule=rule, **arguments)
