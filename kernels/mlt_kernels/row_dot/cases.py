"""Arguments of `row_dot` for tests (small, awkward sizes) and benches (real sizes)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes; `tokens` are the leading dims of the indices, and a share `missing` of the indices names no row."""

    M: int
    D: int
    tokens: tuple[int, ...]
    K: int
    missing: float = 0.0


TESTS: dict[str, Case] = {
    "odd": Case(M=37, D=19, tokens=(2, 63), K=5, missing=0.2),
    "many_slots": Case(M=50, D=8, tokens=(300,), K=19),
    "one_token": Case(M=9, D=4, tokens=(), K=3),
    "crowded": Case(M=2, D=8, tokens=(1, 100), K=7),
}

BENCHES: dict[str, Case] = {
    "cpu_experts": Case(M=65536, D=256, tokens=(1, 2048), K=128),
    "experts": Case(M=2**20, D=1024, tokens=(2, 8192), K=128),
}


def arguments(case: Case, *, seed: int = 0, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Arguments for `row_dot`."""
    rng = np.random.default_rng(seed)
    shape = (*case.tokens, case.K)
    indices = rng.integers(0, case.M, shape)
    outside = rng.choice([-1, -case.M, case.M, -(2**31), 2**31 - 1], shape)
    indices = np.where(rng.random(shape) < case.missing, outside, indices)
    return {
        "table": jnp.asarray(rng.standard_normal((case.M, case.D)), dtype),
        "indices": jnp.asarray(indices, jnp.int32),
        "x": jnp.asarray(rng.standard_normal((*case.tokens, case.D)), dtype),
    }
