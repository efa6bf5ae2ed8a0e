"""Mixers that keep more than one state, against the equations of their papers: loops in float64, one document at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlt.mixers.base import BuildInfo, Context, SequenceMixerConfig
from mlt.mixers.sequence.elm import ELM
from mlt.mixers.sequence.gated_delta import GatedDelta
from mlt.mixers.sequence.gated_linear_attention import GatedLinearAttention
from mlt.mixers.sequence.hcam import HCAM
from mlt.mixers.sequence.long_vq import LongVQ
from mlt.mixers.sequence.memory_caching import MemoryCaching
from mlt.mixers.sequence.mixture_of_memories import MixtureOfMemories
from mlt.nn.param import initialize, merge, named_leaves, partition
from mlt.parallel.rules import Rules
from mlt.verify.material import lively

INFO = BuildInfo(d_model=12, num_sub_layers=4, vocab_size=8)
SIZES = (11, 1, 7)
"""Tokens of the row's documents."""

Weights = dict[str, np.ndarray]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def rms(x, eps=1e-6):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps)


def l2(x):
    return x / np.sqrt(np.sum(x * x, -1, keepdims=True) + 1e-6)


def linear(w: Weights, name: str, x: np.ndarray, dims: int = 1) -> np.ndarray:
    return np.tensordot(x, w[f"{name}.kernel"], dims) + w.get(f"{name}.bias", 0.0)


def conv(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    kernel = w[f"{name}.kernel"]
    front = np.concatenate([np.zeros((len(kernel) - 1, *x.shape[1:])), x])
    return silu(sum(kernel[i] * front[i : i + len(x)] for i in range(len(kernel))))


def rotated(x, position, base=10_000.0):
    half = x.shape[-1] // 2
    angle = position[:, None, None] * base ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], -1)


def gated_delta_parts(c, w, x):
    q, k = (l2(conv(w, f"{name}_conv", linear(w, name, x))) for name in ("query", "key"))
    q, k = (np.repeat(part, c.num_heads // part.shape[1], axis=1) for part in (q, k))
    v = conv(w, "value_conv", linear(w, "value", x))
    decay = np.exp(-np.exp(w["A_log"]) * np.log1p(np.exp(linear(w, "decay", x) + w["dt_bias"])))[:, :, None, None]
    beta = sigmoid(linear(w, "beta", x))[:, :, None, None]

    def write(S, t):
        S = decay[t] * S
        return S + beta[t] * k[t][:, :, None] * (v[t] - np.einsum("hkv,hk->hv", S, k[t]))[:, None]

    return q / np.sqrt(c.key_dim), write, lambda o: linear(w, "output", rms(o) * w["norm.scale"] * silu(linear(w, "gate", x)), 2)


def gla_parts(c, w, x):
    q, k, v = (linear(w, name, x) for name in ("query", "key", "value"))
    decay = sigmoid(linear(w, "decay_out", linear(w, "decay_in", x))) ** (1 / c.temperature)
    write = lambda S, t: decay[t][..., None] * S + k[t][:, :, None] * v[t][:, None]  # noqa: E731
    return q / np.sqrt(c.key_dim), write, lambda o: linear(w, "output", rms(o) * w["norm.scale"] * silu(linear(w, "gate", x)), 2)


def memory_caching(c, w, x):
    base = {name.removeprefix("memory."): value for name, value in w.items()}
    parts = gated_delta_parts if isinstance(c.memory, GatedDelta) else gla_parts
    q, write, finish = parts(c.memory, base, x)
    H, K = q.shape[1:]
    S, kept, means, out = np.zeros((H, K, c.memory.values)), [], [], []
    for t in range(len(x)):
        first = t - t % c.segment
        if t == first and c.independent:
            S = np.zeros_like(S)
        S = write(S, t)
        states, features = [*kept, S], np.stack([*means, x[first : t + 1].mean(0)])
        if c.variant == "residual":
            gate = np.ones(len(states))
        else:
            score = features @ (x[t] @ w["gate.kernel"])
            if c.variant == "sparse" and len(kept) > c.selected:
                score[np.argsort(score[:-1])[: -c.selected]] = -np.inf
            gate = softmax(score)
        if c.variant == "soup":
            out.append(np.einsum("hkv,hk->hv", sum(g * state for g, state in zip(gate, states, strict=True)), q[t]))
        else:
            out.append(sum(g * np.einsum("hkv,hk->hv", state, q[t]) for g, state in zip(gate, states, strict=True)))
        if t % c.segment == c.segment - 1:
            kept, means = [*kept, S], [*means, features[-1]]
    return finish(np.stack(out))


def hcam(c, w, x):
    T, D = x.shape
    q, k, v = (linear(w, name, x) for name in ("query", "key", "value"))
    position = np.arange(T)
    near_q, near_k = (rotated(part, position) if c.rope_base else part for part in (q, k))
    content = x
    if c.chunk_positions:
        back = c.chunk - 1 - position % c.chunk
        angle = back[:, None] * 10_000.0 ** (-np.arange(D // 2) / (D // 2))
        content = x + np.concatenate([np.sin(angle), np.cos(angle)], -1)
    far_k, far_v = linear(w, "key", content), linear(w, "value", content)
    out, root = np.zeros(q.shape), np.sqrt(c.head_dim)
    for t in range(T):
        recent = slice(max(t - c.local_window + 1, 0), t + 1)
        chance = softmax(np.einsum("nh,snh->ns", near_q[t], near_k[recent]) / root)
        out[t] = np.einsum("ns,snh->nh", chance, v[recent])
        closed = [slice(i * c.chunk, (i + 1) * c.chunk) for i in range(t // c.chunk)]
        if not closed:
            continue
        summaries = np.stack([linear(w, "summary", x[part].mean(0)) for part in closed])
        score = summaries @ linear(w, "search", x[t]) / np.sqrt(c.summaries)
        chosen = np.argsort(-score)[: c.selected]
        for weight, part in zip(softmax(score[chosen]), [closed[i] for i in chosen], strict=True):
            chance = softmax(np.einsum("nh,snh->ns", q[t], far_k[part]) / root)
            out[t] += weight * np.einsum("ns,snh->nh", chance, far_v[part])
    return linear(w, "output", out, 2)


def elm(c, w, x):
    low, high = c.timescales
    tau = low + (high - low) * sigmoid(w["timescale"]) if c.learn_timescales else np.geomspace(low, high, c.memories)
    keep = np.exp(-1 / tau)
    take = c.gain * (1 - keep) if c.version == 1 else 1 - np.exp(-c.gain / tau)
    kappa, synapse = np.exp(-1 / c.synapse_timescale), np.maximum(w["synapse"], 0.0)
    traces, m, out = np.zeros(synapse.shape), np.zeros(c.memories), []
    for u in x:
        traces = kappa * traces + synapse * u.reshape(synapse.shape)
        hidden = np.maximum(linear(w, "branch_in", traces.sum(-1)) + (keep * m) @ w["memory_in"], 0.0)
        m = keep * m + take * 1.7159 * np.tanh(2 / 3 * (hidden @ w["network_out"] + w["network_bias"]))
        out.append(m)
    return linear(w, "output", np.stack(out))


def long_vq(c, w, x):
    keep, average, e = sigmoid(w["keep"]), [], np.zeros(x.shape[1])
    for u in x:
        e = keep * e + (1 - keep) * u
        average.append(e)
    average = np.stack(average)
    q, k, v = linear(w, "query", average), rms(linear(w, "key", average)), silu(linear(w, "value", x))
    distance = ((k[:, :, None] - w["codebook"]) ** 2).sum(-1)
    rounded = w["codebook"][np.arange(c.num_heads), distance.argmin(-1)]
    score = np.einsum("tnk,snk->nts", q, rounded) / np.sqrt(c.key_dim)
    chance = softmax(np.where(np.tri(len(x), dtype=bool), score, -np.inf))
    return linear(w, "output", silu(linear(w, "gate", average)) * np.einsum("nts,snv->tnv", chance, v), 2)


delta = GatedDelta(num_heads=2, num_key_heads=1, key_dim=4, value_dim=6)
gla = GatedLinearAttention(num_heads=2, key_dim=4, value_dim=6, gate_rank=3)
CASES: list[tuple[Callable, SequenceMixerConfig]] = [
    (memory_caching, MemoryCaching(memory=delta, segment=3)),
    (memory_caching, MemoryCaching(memory=delta, segment=2, independent=False)),
    (memory_caching, MemoryCaching(memory=delta, segment=3, variant="residual")),
    (memory_caching, MemoryCaching(memory=delta, segment=3, variant="soup")),
    (memory_caching, MemoryCaching(memory=gla, segment=2, variant="sparse", selected=2)),
    (hcam, HCAM(num_heads=2, head_dim=4, chunk=3, selected=2, summary_dim=5)),
    (hcam, HCAM(num_heads=2, head_dim=4, chunk=2, selected=3, window=5, stop_gradient=False, chunk_positions=False)),
    (elm, ELM(memories=5, branches=4, timescales=(1.0, 30.0))),
    (elm, ELM(memories=5, branches=4, timescales=(1.0, 30.0), version=2, learn_timescales=True)),
    (long_vq, LongVQ(num_heads=2, key_dim=4, value_dim=5, codes=5, window=3)),
]


def row(config: SequenceMixerConfig):
    """The mixer with lively weights, a stream and the row's context."""
    mixer = lively(initialize(config.build(INFO), 3), 4, std=0.2)
    x = np.random.default_rng(5).standard_normal((1, sum(SIZES), INFO.d_model)).astype(np.float32)
    segments = np.repeat(np.arange(1, len(SIZES) + 1, dtype=np.int32), SIZES)[None]
    positions = np.concatenate([np.arange(size, dtype=np.int32) for size in SIZES])[None]
    return mixer, x, Context(np.zeros_like(segments), segments, positions, Rules(None), False)


@pytest.mark.parametrize(("paper", "config"), CASES, ids=[f"{type(config).__name__}-{i}" for i, (_, config) in enumerate(CASES)])
def test_the_mixer_computes_its_papers_equations(paper, config):
    mixer, x, context = row(config)
    y = np.asarray(jax.jit(lambda x: mixer(x, context)[0])(x))[0]
    weights = {name: np.asarray(leaf, np.float64) for name, leaf in named_leaves(mixer)}
    documents = np.split(x[0].astype(np.float64), np.cumsum(SIZES)[:-1])
    expected = np.concatenate([paper(config, weights, document) for document in documents])
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_sorted_memories_are_the_dense_ones_in_values_and_gradients():
    config = MixtureOfMemories(num_heads=2, key_dim=4, value_dim=6, num_memories=3, memories_per_token=2)
    _, x, context = row(config)
    cotangent = np.random.default_rng(6).standard_normal(x.shape).astype(np.float32)
    found = []
    for form in (config.replace(sorted=True), config):
        trained, buffers = partition(lively(initialize(form.build(INFO), 3), 4, std=0.2))

        def objective(trained, x, cotangent, buffers=buffers):
            y = merge(trained, buffers)(x, context)[0]
            return jnp.sum(y * cotangent), y

        gradient = jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))
        (grads, dx), y = gradient(trained, x, cotangent)
        found.append([y, dx, *jax.tree.leaves(grads)])
        if form.sorted:
            # Token 5 and those before it are no function of later ones, of whatever memory: convolution and order leak nothing.
            early = np.where(np.arange(sum(SIZES))[:, None] <= 5, cotangent, 0)
            later = np.asarray(gradient(trained, x, early)[0][1])[0, 6:]
            assert not np.any(later)
    for sorted_, dense in zip(*found, strict=True):
        np.testing.assert_allclose(sorted_, dense, rtol=0, atol=2e-5 * np.abs(np.asarray(dense)).max())


def test_constant_past_takes_no_gradient_and_chooses_all_the_same():
    """HCAM's stored contents are constants; what the choice and the chunks are made of still learns."""
    grads = {}
    for stop in (True, False):
        config = HCAM(num_heads=2, head_dim=4, chunk=3, selected=2, window=1, stop_gradient=stop)
        mixer, x, context = row(config)
        late = np.zeros((1, sum(SIZES), INFO.d_model), np.float32)
        late[0, 9:11] = 1.0

        def objective(mixer, x, context=context, late=late):
            return jnp.sum(mixer(x, context)[0] * late)

        grads[stop] = jax.jit(jax.grad(objective, argnums=(0, 1)))(mixer, x)
    assert not np.any(np.asarray(grads[True][1])[0, :9])
    assert np.all(np.any(np.asarray(grads[False][1])[0, :9], axis=-1))
    for stopped, name in ((grads[True][0].summary, "summary"), (grads[True][0].search, "search")):
        assert np.any(np.asarray(stopped.kernel[...])), name


def test_the_memory_of_an_elm_stays_within_its_bound():
    config = ELM(memories=5, branches=4, timescales=(1.0, 30.0), gain=3.0)
    mixer, x, context = row(config)
    mixer.output.kernel = jax.tree.map(lambda kernel: jnp.eye(*kernel.shape), mixer.output.kernel)
    y = np.asarray(mixer(100 * x, context)[0])
    assert np.abs(y).max() <= 3.0 * 1.7159 * (1 + 1e-6)
    assert np.abs(y).max() > 1.0


def test_a_cached_memory_leaves_the_exchange_to_its_layer():
    (problem,) = MemoryCaching(memory=GatedDelta(num_heads=2, key_dim=4, exchange="permute")).problems()
    assert (problem.path, problem.ways_out) == ("memory.exchange", "set exchange")
    assert not list(MemoryCaching(memory=GatedDelta(num_heads=2, key_dim=4), exchange="permute").problems())
