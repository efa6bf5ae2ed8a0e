"""Arguments of `cross_entropy` for tests (small, awkward sizes) and benches (real sizes)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and options. `weights`: None, or random ones of which some are 0 with labels outside the vocabulary."""

    B: int = 2
    T: int = 63
    D: int = 20
    V: int = 101
    weights: bool = True
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


TESTS: dict[str, Case] = {
    "one_chunk": Case(weights=False),
    "chunks": Case(options={"chunk_size": 16}),
    "one_token": Case(B=1, T=1),
    "z_loss": Case(T=100, options={"chunk_size": 30, "z_loss": 1e-2}),
    "softcap": Case(T=50, options={"chunk_size": 20, "z_loss": 1e-2, "softcap": 2.5}),
}

BENCHES: dict[str, Case] = {
    "cpu": Case(B=1, T=2048, D=256, V=32768),
    "long": Case(B=1, T=8192, D=2048, V=131072),
}


def arguments(case: Case, *, seed: int = 0, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Keyword arguments for `cross_entropy`."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, case.V, (case.B, case.T))
    made: dict[str, Any] = {
        "hidden": jnp.asarray(rng.standard_normal((case.B, case.T, case.D)), dtype),
        "unembedding": jnp.asarray(rng.standard_normal((case.D, case.V)) * case.D**-0.5 * 2, dtype),
        **case.options,
    }
    if case.weights:
        weights = rng.random((case.B, case.T)) * (rng.random((case.B, case.T)) > 0.3)
        outside = rng.choice([-100, -1, case.V, 2**31 - 1], (case.B, case.T))
        labels = np.where((weights == 0) & (rng.random(labels.shape) > 0.3), outside, labels)
        made["weights"] = jnp.asarray(weights, jnp.float32)
    return made | {"labels": jnp.asarray(labels, jnp.int32)}
