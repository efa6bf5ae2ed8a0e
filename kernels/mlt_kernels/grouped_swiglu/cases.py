"""Arguments of `grouped_swiglu` for tests (small, awkward sizes) and benches (real sizes)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from mlt_kernels.grouped_matmul.cases import group_sizes


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes; `group_sizes` are drawn unevenly to the sum of `rows` where not given."""

    M: int
    E: int
    D: int
    F: int
    group_sizes: tuple[int, ...] | None = None
    rows: int | None = None


TESTS: dict[str, Case] = {
    "long_groups": Case(M=700, E=2, D=33, F=20, group_sizes=(561, 97)),
    "empty_groups": Case(M=90, E=6, D=17, F=33, group_sizes=(0, 5, 0, 70, 2, 0)),
    "no_rows": Case(M=20, E=3, D=8, F=8, group_sizes=(0, 0, 0)),
    "one_group_full": Case(M=130, E=1, D=24, F=7),
    "one_row": Case(M=1, E=4, D=9, F=5),
    "more_groups_than_rows": Case(M=5, E=13, D=16, F=12),
}

BENCHES: dict[str, Case] = {  # the experts' standard shapes are rows of `mlt.bench`; these are many small experts
    "cpu": Case(M=4096, E=32, D=128, F=64),
    "h100": Case(M=8192, E=32, D=512, F=128),
}


def arguments(case: Case, *, seed: int = 0, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Arguments for `grouped_swiglu`."""
    rng = np.random.default_rng(seed)
    sizes = group_sizes(rng, case)
    E, D, F = case.E, case.D, case.F
    shapes = {"x": (case.M, D), "gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
    made = {name: jnp.asarray(rng.standard_normal(s) * (1 if name == "x" else s[1] ** -0.5), dtype) for name, s in shapes.items()}
    return {**made, "group_sizes": sizes}
