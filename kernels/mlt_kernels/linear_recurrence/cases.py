"""Arguments of `linear_recurrence` for tests (small, awkward sizes) and benches (real sizes)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from mlt_kernels.linear_recurrence import NormalizedState
from mlt_kernels.testing import segment_ids


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and kind of one call. `decay` is none, head (constant), scalar or vector; `documents` their mean length,
    None for no segment ids; `strongest` the most negative log decay, drawn uniformly from there to 0 if given."""

    B: int = 2
    T: int = 53
    Hk: int = 2
    H: int = 4
    K: int = 8
    V: int = 12
    decay: str = "scalar"
    beta: bool = True
    log_input: bool = False
    state: bool = True
    documents: float | None = 9.0
    strongest: float | None = None
    positive: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


TESTS: dict[str, Case] = {
    "ssd": Case(Hk=1, beta=False, options={"chunk_size": 16}),
    "gla": Case(decay="vector", beta=False, options={"chunk_size": 32}),
    "delta": Case(decay="none", options={"rule": "delta", "chunk_size": 16}),
    "gated_delta": Case(options={"rule": "delta", "chunk_size": 32}),
    "kda": Case(Hk=4, decay="vector", options={"rule": "delta", "chunk_size": 16}),
    "mlstm": Case(log_input=True, beta=False, options={"normalizer": "mlstm", "chunk_size": 16}),
    "sum": Case(log_input=True, positive=True, options={"normalizer": "sum", "chunk_size": 16}),
    "retnet": Case(decay="head", beta=False, documents=None, options={"chunk_size": 16}),
}

BENCHES: dict[str, Case] = {
    "cpu_ssd": Case(B=1, T=2048, Hk=8, H=8, K=64, V=64, beta=False, state=False, documents=400.0),
    "cpu_gated_delta": Case(B=1, T=2048, Hk=4, H=4, K=64, V=64, state=False, documents=400.0, options={"rule": "delta"}),
    "cpu_kda": Case(B=1, T=2048, Hk=4, H=4, K=64, V=64, decay="vector", state=False, documents=400.0, options={"rule": "delta"}),
    "ssd": Case(B=8, T=4096, Hk=1, H=64, K=128, V=64, beta=False, state=False, documents=1024.0),
    "gated_delta": Case(B=8, T=4096, Hk=16, H=32, K=128, V=128, state=False, documents=1024.0, options={"rule": "delta"}),
    "kda": Case(B=8, T=4096, Hk=32, H=32, K=128, V=128, decay="vector", state=False, documents=1024.0, options={"rule": "delta"}),
}


def arguments(case: Case, *, seed: int = 0, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Keyword arguments of the public function, the same numbers for every dtype. Gates and states keep 32 bits."""
    rng = np.random.default_rng(seed)
    B, T, H, K = case.B, case.T, case.H, case.K
    kind = jnp.promote_types(dtype, jnp.float32)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape)

    q, k = normal(B, T, case.Hk, K), normal(B, T, case.Hk, K)
    if case.positive:
        q, k = abs(q), abs(k)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    made: dict[str, Any] = {"q": q, "k": k, "v": normal(B, T, H, case.V)}
    gates: dict[str, Any] = {}
    shape = {"none": None, "head": (H,), "scalar": (B, T, H), "vector": (B, T, H, K)}[case.decay]
    if shape is not None:
        mild = -np.exp(normal(*shape) - 2)
        gates["log_decay"] = mild if case.strongest is None else rng.uniform(case.strongest, 0.0, shape)
    if case.beta:
        gates["beta"] = 1 / (1 + np.exp(-normal(B, T, H)))
    if case.log_input:
        gates["log_input"] = normal(B, T, H)
    arrays = {name: jnp.asarray(x, dtype) for name, x in made.items()}
    arrays |= {name: jnp.asarray(x, kind) for name, x in gates.items()}
    if case.state:
        value = jnp.asarray(normal(B, H, K, case.V), kind)
        key_sum = jnp.asarray(abs(normal(B, H, K)), kind)
        scale = jnp.asarray(rng.random((B, H)), kind)
        normalized = case.options.get("normalizer", "none") != "none"
        arrays["initial_state"] = NormalizedState(value, key_sum, scale) if normalized else value
    if case.documents is not None:
        arrays["segment_ids"] = jnp.asarray(segment_ids(seed, B, T, mean_document=case.documents))
    return {**arrays, **case.options}


def one_key(decay: str, *, tokens: int = 150, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Arguments of the delta rule that forgive no rounding: one key in every token, beta 2, no decay or decays near 0.

    Every write turns the state around along the key, so writes are twice as large as the state, of alternating signs, and all
    sums over tokens cancel. One bfloat16 number in the way of them costs several per cent. The key is any: one whose square is a
    power of two would make the inverse of a chunk exact in bfloat16.
    """
    case = Case(B=1, T=tokens, Hk=1, H=2, K=16, V=32, decay=decay, strongest=-0.01, documents=None)
    given = arguments(case, dtype=dtype)
    k, beta = given["k"], given["beta"]
    return given | {"k": jnp.broadcast_to(k[:, :1], k.shape), "beta": jnp.full_like(beta, 2)}
