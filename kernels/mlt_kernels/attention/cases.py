"""Arguments of `attention` for tests (small, awkward sizes) and benches (real sizes)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from mlt_kernels.testing import segment_ids


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes, and what else the call gets. `documents` is the mean length of packed documents, None for no segments."""

    B: int = 2
    T: int = 150
    S: int | None = None
    N: int = 4
    K: int = 1
    H: int = 8
    P: int = 8
    documents: float | None = None
    cache: bool = False
    bias: tuple[bool, bool, bool, bool] | None = None
    sinks: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def keys(self) -> int:
        return self.T if self.S is None else self.S


TESTS: dict[str, Case] = {
    "causal": Case(),
    "odd": Case(T=63, N=3, K=3, H=5, P=7),
    "one_token": Case(T=1, N=2),
    "more_keys": Case(T=37, S=190, options={"window": 50}),
    "more_queries": Case(B=1, T=100, S=70, N=2, sinks=True),
    "packed_window": Case(T=200, N=6, K=2, documents=80.0, options={"window": 37}),
    "packed_all_keys": Case(T=100, documents=20.0, options={"causal": False, "softcap": 2.0, "scale": 1.0}),
    "decode": Case(T=1, S=200, N=4, K=2, cache=True),
    "cache": Case(T=40, S=200, N=2, K=2, cache=True, sinks=True),
    "bias": Case(T=100, N=2, bias=(True, False, True, True)),
    "head_bias": Case(T=70, S=131, N=4, K=2, bias=(False, True, False, True), options={"causal": False}),
    "everything": Case(
        T=135,
        N=6,
        K=2,
        H=12,
        documents=25.0,
        sinks=True,
        bias=(True, True, True, True),
        options={"window": 40, "softcap": 3.0, "scale": 0.7},
    ),
}

BENCHES: dict[str, Case] = {
    "cpu": Case(B=4, T=1024, N=4, K=4, H=64, P=64),
    "cpu_packed": Case(B=4, T=1024, N=4, K=4, H=64, P=64, documents=128.0),
    "long": Case(B=1, T=8192, N=16, K=4, H=128, P=128),
    "long_packed": Case(B=1, T=8192, N=16, K=4, H=128, P=128, documents=1024.0),
    "window": Case(B=1, T=8192, N=16, K=4, H=128, P=128, options={"window": 1024}),
}


def arguments(case: Case, *, seed: int = 0, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Keyword arguments for `attention`."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jnp.ndarray:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    B, T, S = case.B, case.T, case.keys
    made: dict[str, Any] = {
        "q": normal(B, T, case.N, case.H),
        "k": normal(B, S, case.K, case.H),
        "v": normal(B, S, case.K, case.P),
        **case.options,
    }
    if case.documents is not None:
        made["segment_ids"] = jnp.asarray(segment_ids(seed, B, T, mean_document=case.documents))
    if case.cache:
        made |= _cache(rng, B, T, S)
    if case.sinks:
        made["sinks"] = normal(case.N)
    if case.bias is not None:
        full = (B, case.N, T, S)
        made["bias"] = normal(*(size if wide else 1 for size, wide in zip(full, case.bias, strict=True)))
    return made


def _cache(rng: np.random.Generator, B: int, T: int, S: int) -> dict[str, Any]:
    """A cache whose slots hold shuffled positions and partly nothing, and queries at late positions of it.

    The first query of the last row belongs to no document, and the second to one that is not in the cache.
    """
    k_pos = np.stack([rng.permutation(S) for _ in range(B)]).astype(np.int32)
    k_seg = np.where(rng.random((B, S)) < 0.3, 0, 1 + (k_pos > S // 2)).astype(np.int32)
    q_pos = np.sort(rng.integers(S // 2, S, (B, T)), axis=1).astype(np.int32)
    q_seg = rng.integers(1, 3, (B, T)).astype(np.int32)
    if T > 1:
        q_seg[-1, :2] = (0, 7)
    return {
        "segment_ids": (jnp.asarray(q_seg), jnp.asarray(k_seg)),
        "positions": (jnp.asarray(q_pos), jnp.asarray(k_pos)),
    }
