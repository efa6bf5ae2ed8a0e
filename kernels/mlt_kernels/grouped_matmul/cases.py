"""Arguments of `grouped_matmul` for tests (small, awkward sizes) and benches (real sizes)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes; `group_sizes` are drawn unevenly to the sum of `rows` where not given."""

    M: int
    E: int
    K: int
    N: int
    group_sizes: tuple[int, ...] | None = None
    rows: int | None = None


TESTS: dict[str, Case] = {
    "odd": Case(M=300, E=3, K=63, N=100, rows=257),
    "empty_groups": Case(M=90, E=6, K=17, N=33, group_sizes=(0, 5, 0, 70, 2, 0)),
    "no_rows": Case(M=20, E=3, K=8, N=8, group_sizes=(0, 0, 0)),
    "one_group_full": Case(M=130, E=1, K=24, N=7),
    "one_row": Case(M=1, E=4, K=9, N=5),
    "more_groups_than_rows": Case(M=5, E=13, K=16, N=12),
}

BENCHES: dict[str, Case] = {
    "cpu": Case(M=8192, E=16, K=256, N=512),
    "h100": Case(M=65536, E=64, K=2048, N=1024),
}


def group_sizes(rng: np.random.Generator, case: Any) -> jnp.ndarray:
    """(E,) int32: those of the case, or drawn unevenly to its sum."""
    if case.group_sizes is not None:
        return jnp.asarray(case.group_sizes, jnp.int32)
    rows = case.M if case.rows is None else case.rows
    return jnp.asarray(rng.multinomial(rows, rng.dirichlet(np.full(case.E, 5.0))), jnp.int32)


def arguments(case: Case, *, seed: int = 0, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Arguments for `grouped_matmul`."""
    rng = np.random.default_rng(seed)
    sizes = group_sizes(rng, case)
    return {
        "lhs": jnp.asarray(rng.standard_normal((case.M, case.K)), dtype),
        "rhs": jnp.asarray(rng.standard_normal((case.E, case.K, case.N)), dtype),
        "group_sizes": sizes,
    }
