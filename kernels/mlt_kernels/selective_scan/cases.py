"""Arguments of `selective_scan` for tests (small, awkward sizes) and benches (real sizes)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from mlt_kernels.testing import segment_ids


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and options of one call; `strongest` is the most negative log decay of a step."""

    B: int
    T: int
    D: int
    N: int
    skip: bool = False
    segments: bool = False
    state: bool = False
    strongest: float = -2.0
    all_padding: bool = False


TESTS: dict[str, Case] = {
    "plain": Case(B=2, T=63, D=5, N=4),
    "packed": Case(B=2, T=130, D=7, N=3, skip=True, segments=True, state=True),
    "extreme": Case(B=2, T=130, D=7, N=3, skip=True, segments=True, state=True, strongest=-60.0),
    "padding": Case(B=2, T=130, D=7, N=3, skip=True, segments=True, state=True, all_padding=True),
    "one_token": Case(B=2, T=1, D=3, N=1, state=True),
}
"""Three are of one shape: what is compiled for one runs the others."""

BENCHES: dict[str, Case] = {
    "cpu_mamba1": Case(B=1, T=1024, D=256, N=16, skip=True, segments=True),
    "mamba1": Case(B=8, T=2048, D=4096, N=16, skip=True, segments=True),
}


def arguments(case: Case, *, seed: int = 0, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Arguments of the public function, the same numbers for every dtype."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Any:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    B, T, D, N = case.B, case.T, case.D, case.N
    step = rng.uniform(0.0, 1.0, (B, T, D))
    A = case.strongest * rng.uniform(0.05, 1.0, (D, N))
    packed = np.zeros((B, T), np.int32) if case.all_padding else segment_ids(seed, B, T)
    made = {
        "x": normal(B, T, D),
        "step": jnp.asarray(step, dtype),
        "A": jnp.asarray(A, dtype),
        "B": normal(B, T, N),
        "C": normal(B, T, N),
        "skip": normal(D) if case.skip else None,
        "initial_state": normal(B, D, N) if case.state else None,
        "segment_ids": jnp.asarray(packed) if case.segments else None,
    }
    return {name: value for name, value in made.items() if value is not None}
