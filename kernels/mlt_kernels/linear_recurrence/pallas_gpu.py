"""GPU kernels in Pallas-Triton: `_pallas_add` for the add rule, `_pallas_delta` for the delta rule.

Status: numbers checked in interpret mode, programs lowered and compiled for an H200; not run on a GPU.
"""

import importlib
import importlib.util
from types import ModuleType
from typing import Any

from jax import Array

from mlt_kernels import pallas
from mlt_kernels.linear_recurrence import NormalizedState

MODULES = {"add": f"{__package__}._pallas_add", "delta": f"{__package__}._pallas_delta"}


def unsupported(*, rule: str, **arguments: Any) -> str | None:
    if importlib.util.find_spec(MODULES[rule]) is None:
        return f"there is no kernel for rule={rule!r}"
    return pallas.unsupported_platform("gpu") or _module(rule).unsupported(rule=rule, **arguments)


def run(
    *,
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | None,
    beta: Array | None,
    rule: str,
    log_input: Array | None,
    normalizer: str,
    scale: float,
    initial_state: Array | NormalizedState | None,
    segment_ids: Array | None,
    chunk_size: int,
    return_final_state: bool,
    return_chunk_states: bool,
) -> Any:
    return _module(rule).run(
        q=q,
        k=k,
        v=v,
        log_decay=log_decay,
        beta=beta,
        rule=rule,
        log_input=log_input,
        normalizer=normalizer,
        scale=scale,
        initial_state=initial_state,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        return_final_state=return_final_state,
        return_chunk_states=return_chunk_states,
    )


def _module(rule: str) -> ModuleType:
    return importlib.import_module(MODULES[rule])
