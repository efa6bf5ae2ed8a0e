"""Arguments of `test_time_memory` for tests (small, awkward sizes) and benches (real sizes)."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlt_kernels.test_time_memory import LM_NEWTON_SCHULZ, MemorySpec, initial_state
from mlt_kernels.testing import segment_ids


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and kind of one call; `documents` is their mean length, None for no segment ids; `momentum` of rule "chunk";
    `step` the mean of the steps; `scale` the standard deviation of the initial weights, None for 1 / sqrt(fan-in); `state` an
    initial state in the middle of a chunk."""

    spec: MemorySpec
    B: int = 2
    T: int = 29
    H: int = 2
    K: int = 6
    V: int = 6
    hidden: int = 8
    layers: int = 2
    documents: float | None = 7.0
    decay: bool = True
    momentum: bool = False
    per_matrix: bool = False
    step: float = 0.1
    scale: float | None = None
    state: bool = False


TITANS = MemorySpec(chunk_size=4, activation="silu", loss_scale=2.0, rule="momentum")
TTT = {"bias": True, "layer_norm": True, "residual": True, "rule": "mean"}
MIRAS: dict[str, Any] = {"layer_norm": True, "residual": True}

# What a memory learns shows in few tokens: steps a hundred times the published ones, and LaCT's chunks shorter than its head, so
# that most singular values of a step are 0. Good for comparisons in float64; in float32 these functions are too steep.
TESTS: dict[str, Case] = {
    "titans": Case(TITANS, state=True),
    "titans_deep": Case(dataclasses.replace(TITANS, layer_norm=True, residual=True), layers=3, decay=False, documents=None),
    "ttt_mlp": Case(MemorySpec(chunk_size=8, **TTT), decay=False),
    "lact": Case(
        MemorySpec(
            chunk_size=4,
            net="gated",
            activation="silu",
            loss="dot",
            rule="chunk",
            read="chunk",
            newton_schulz=LM_NEWTON_SCHULZ,
            row_norm=True,
        ),
        V=5,
        momentum=True,
        per_matrix=True,
        state=True,
    ),
    "moneta": Case(MemorySpec(chunk_size=4, loss="lp", link="pnorm", **MIRAS)),
    "yaad": Case(MemorySpec(chunk_size=4, loss="huber_mix", **MIRAS)),
    "memora": Case(MemorySpec(chunk_size=4, loss_scale=2.0, link="softmax", read="chunk", **MIRAS)),
    "tnt_local": Case(MemorySpec(chunk_size=2, reset_every=4, loss_scale=2.0), decay=False, documents=12.0),
    "tnt_global": Case(MemorySpec(chunk_size=4, net="gated", loss="huber_norm", read="chunk"), decay=False, V=7),
}

STEP = 0.05 / 64
"""A published step: of TTT's, Titans' and Miras' MLPs, 0.1 sigmoid(0) / head_dim with heads of 64."""


def _published(name: str, **changes: Any) -> Case:
    # Sixteen values a head: with six, a layer norm now and then divides by next to nothing.
    return dataclasses.replace(TESTS[name], **({"step": STEP, "K": 16, "V": 16, "hidden": 32} | changes))


# The memories as their papers and code have them: steps, initial weights, and for LaCT five times as many tokens in a chunk as
# its head is wide (2048 of 384) at softplus^-1(0.001).
PUBLISHED: dict[str, Case] = {
    "titans": _published("titans", scale=0.02),
    "titans_deep": _published("titans_deep"),
    "ttt_mlp": _published("ttt_mlp", scale=0.02),
    "lact": _published(
        "lact",
        **{"step": 1e-3, "T": 90, "K": 6, "V": 5, "hidden": 6, "documents": 50.0},
        spec=dataclasses.replace(TESTS["lact"].spec, chunk_size=32),
    ),
    "moneta": _published("moneta"),
    "yaad": _published("yaad"),
    "memora": _published("memora", scale=1.0),
    "tnt_local": _published("tnt_local"),
    "tnt_global": _published("tnt_global"),
}

BENCHES: dict[str, Case] = {
    "cpu_ttt_linear": Case(MemorySpec(chunk_size=16, net="linear", **TTT), 1, 2048, 4, 64, 64, decay=False, documents=None),
    "cpu_titans": Case(dataclasses.replace(TITANS, chunk_size=64), 1, 2048, 4, 64, 64, 256, documents=400.0),
    "ttt_mlp": Case(MemorySpec(chunk_size=64, **TTT), 8, 4096, 16, 64, 64, 256, decay=False, documents=1024.0),
    "titans": Case(dataclasses.replace(TITANS, chunk_size=64), 8, 4096, 16, 64, 64, 256, documents=1024.0),
    "lact": Case(
        dataclasses.replace(TESTS["lact"].spec, chunk_size=2048), 1, 32768, 4, 384, 384, 384, documents=None, momentum=True
    ),
}


def arguments(case: Case, *, seed: int = 0, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Keyword arguments of the public function, the same numbers for every dtype. Memories and gates keep 32 bits."""
    rng = np.random.default_rng(seed)
    spec, B, T, H, K, V = case.spec, case.B, case.T, case.H, case.K, case.V
    kind = jnp.promote_types(dtype, jnp.float32)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape)

    q, k, v = (
        x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (normal(B, T, H, K), normal(B, T, H, K), normal(B, T, H, V))
    )
    widths = {"linear": [(K, V)], "gated": [(K, case.hidden)] * 2 + [(case.hidden, V)]}.get(spec.net)
    if widths is None:
        sides = [K, *[case.hidden] * (case.layers - 1), V]
        widths = list(itertools.pairwise(sides))
    memory = tuple(jnp.asarray(normal(H, a + spec.bias, b) * (case.scale or a**-0.5), kind) for a, b in widths)
    steps = (B, T, H, len(memory)) if case.per_matrix else (B, T, H)
    gates = {"step": case.step * rng.uniform(0.5, 1.5, steps)}
    if spec.running and case.decay:
        gates["log_decay"] = -rng.uniform(0.0, 0.2, (B, T, H))
    if spec.rule == "momentum" or case.momentum:
        gates["log_momentum"] = -rng.uniform(0.1, 2.0, (B, T, H))
    if spec.loss.startswith("huber"):
        # Some residuals on either side, none near enough for rounding to choose the side.
        gates["threshold"] = rng.uniform(0.5, 2.0, (B, T, H))
    if spec.rule == "mean":
        gates["row_weight"] = 1 / np.arange(1, spec.chunk_size + 1) + 0.1 * rng.random(spec.chunk_size)
    if spec.layer_norm:
        gates |= {"norm_scale": 1 + 0.1 * normal(H, V), "norm_bias": 0.1 * normal(H, V)}
    made = {name: jnp.asarray(x, dtype) for name, x in (("q", q), ("k", k), ("v", v))}
    made |= {"memory": memory, **{name: jnp.asarray(x, kind) for name, x in gates.items()}}
    if case.documents is not None:
        made["segment_ids"] = jnp.asarray(segment_ids(seed, B, T, mean_document=case.documents))
    if case.state:
        start = initial_state(memory, spec, B, momentum=case.momentum)
        noisy = [jnp.asarray(x + 0.1 * normal(*x.shape), kind) for x in jax.tree.leaves(start._replace(position=None))]
        entering = jax.tree.unflatten(jax.tree.structure(start._replace(position=None)), noisy)
        made["initial_state"] = entering._replace(position=jnp.asarray(rng.integers(1, 2 * spec.chunk_size, B), jnp.int32))
    return {**made, "spec": spec}
