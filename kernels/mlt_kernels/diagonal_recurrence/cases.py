"""Arguments of `diagonal_recurrence` for tests (small, awkward sizes) and benches (real sizes)."""

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
    channels: tuple[int, ...]
    is_complex: bool = False
    segments: bool = False
    state: bool = False
    reverse: bool = False
    strongest: float = -2.0


TESTS: dict[str, Case] = {
    "plain": Case(B=2, T=63, channels=(19,)),
    "packed": Case(B=2, T=130, channels=(8,), segments=True, state=True),
    "reverse": Case(B=2, T=70, channels=(8,), segments=True, state=True, reverse=True),
    "complex": Case(B=2, T=65, channels=(3, 4), is_complex=True, segments=True, state=True),
    "extreme": Case(B=2, T=65, channels=(8,), segments=True, strongest=-60.0),
    "one_token": Case(B=2, T=1, channels=(5,), state=True),
    "no_channels": Case(B=2, T=17, channels=()),
}

BENCHES: dict[str, Case] = {
    "cpu_rg_lru": Case(B=1, T=2048, channels=(512,)),
    "rg_lru": Case(B=8, T=4096, channels=(4096,), segments=True),
}


def arguments(case: Case, *, seed: int = 0, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Arguments of the public function, the same numbers for every dtype."""
    rng = np.random.default_rng(seed)
    shape = (case.B, case.T, *case.channels)
    a = np.exp(rng.uniform(case.strongest, 0.0, shape))
    b, state = rng.standard_normal(shape), rng.standard_normal((case.B, *case.channels))
    kind = jnp.dtype(dtype)
    if case.is_complex:
        a = a * np.exp(1j * rng.uniform(-np.pi, np.pi, shape))
        b = b + 1j * rng.standard_normal(shape)
        kind = jnp.dtype(jnp.complex128 if kind.itemsize == 8 else jnp.complex64)
    made = {
        "a": jnp.asarray(a, kind),
        "b": jnp.asarray(b, kind),
        "initial_state": jnp.asarray(state, kind) if case.state else None,
        "segment_ids": jnp.asarray(segment_ids(seed, case.B, case.T)) if case.segments else None,
        "reverse": case.reverse,
    }
    return {name: value for name, value in made.items() if value is not None}
