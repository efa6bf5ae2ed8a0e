"""Arguments of `causal_conv` for tests (small, awkward sizes) and benches (real sizes)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from mlt_kernels.testing import segment_ids


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and options of one call."""

    B: int
    T: int
    D: int
    W: int
    dilation: int = 1
    bias: bool = False
    activation: str | None = None
    segments: bool = False
    halo: bool = False


TESTS: dict[str, Case] = {
    "plain": Case(B=2, T=63, D=19, W=4),
    "packed": Case(B=2, T=63, D=19, W=4, bias=True, activation="silu", segments=True),
    "dilated": Case(B=2, T=40, D=8, W=4, dilation=3, segments=True),
    "halo": Case(B=2, T=21, D=8, W=3, segments=True, halo=True),
    "shorter_than_the_kernel": Case(B=2, T=2, D=8, W=4, dilation=2, activation="silu", segments=True, halo=True),
    "one_token": Case(B=1, T=1, D=4, W=4, halo=True),
    "one_tap": Case(B=2, T=9, D=4, W=1, segments=True),
    "widest": Case(B=1, T=33, D=4, W=8, bias=True, segments=True),
}

BENCHES: dict[str, Case] = {
    "cpu": Case(B=1, T=2048, D=512, W=4, activation="silu", segments=True),
    "gpu": Case(B=8, T=4096, D=4096, W=4, activation="silu", segments=True),
}


def arguments(case: Case, *, seed: int = 0, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Arguments of the public function, the same numbers for every dtype."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> Any:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    made = {
        "x": draw(case.B, case.T, case.D),
        "kernel": draw(case.W, case.D),
        "bias": draw(case.D) if case.bias else None,
        "activation": case.activation,
        "dilation": case.dilation,
        "segment_ids": jnp.asarray(segment_ids(seed, case.B, case.T)) if case.segments else None,
        "halo": draw(case.B, (case.W - 1) * case.dilation, case.D) if case.halo else None,
    }
    return {name: value for name, value in made.items() if value is not None}
