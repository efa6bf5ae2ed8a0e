"""Each recurrent mixer against the equations of its paper: a loop over tokens in float64, one document at a time.

Where a paper or its released code is known to be wrong, the loop is what is right, and says beside it what differs.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlt.mixers.base import BuildInfo, Context, SequenceMixerConfig
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.delta_net import DeltaNet
from mlt.mixers.sequence.differential_attention import DifferentialAttention
from mlt.mixers.sequence.gated_delta import GatedDelta
from mlt.mixers.sequence.gated_linear_attention import GatedLinearAttention
from mlt.mixers.sequence.kimi_delta import KimiDelta
from mlt.mixers.sequence.linear_attention import LinearAttention
from mlt.mixers.sequence.lizard import Lizard
from mlt.mixers.sequence.mamba2 import Mamba2
from mlt.mixers.sequence.mixture_of_memories import MixtureOfMemories
from mlt.mixers.sequence.mlstm import MLSTM
from mlt.mixers.sequence.rat import RAT
from mlt.mixers.sequence.retention import Retention
from mlt.mixers.sequence.slstm import SLSTM
from mlt.nn.param import initialize, named_leaves
from mlt.parallel.rules import Rules
from mlt.verify.material import lively

INFO = BuildInfo(d_model=12, num_sub_layers=4, vocab_size=8)
SIZES = (9, 1, 5)
"""Tokens of the row's documents."""

Weights = dict[str, np.ndarray]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.log1p(np.exp(x))


def rms(x, eps=1e-6):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps)


def layer(x, eps=1e-6):
    return rms(x - x.mean(-1, keepdims=True), eps)


def l2(x):
    return x / np.sqrt(np.sum(x * x, -1, keepdims=True) + 1e-6)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def linear(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    """(T, D) or (T, N, H) through the projection `name`."""
    dims = 2 if name == "output" else 1
    return np.tensordot(x, w[f"{name}.kernel"], dims) + w.get(f"{name}.bias", 0.0)


def conv(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    """Depthwise, the last tap on the current token, then SiLU."""
    kernel = w[f"{name}.kernel"]
    front = np.concatenate([np.zeros((len(kernel) - 1, *x.shape[1:])), x])
    return silu(sum(kernel[i] * front[i : i + len(x)] for i in range(len(kernel))) + w.get(f"{name}.bias", 0.0))


def rotated(x, position, base=10_000.0):
    """(T, N, H) with pairs (i, i + H/2) turned."""
    half = x.shape[-1] // 2
    angle = position[:, None, None] * base ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], -1)


def memory(q, k, v, *, log_decay=0.0, write=1.0, delta=False):
    """S <- e^g S + write k (v - delta S^T k)^T, o = S^T q; arrays (T, H, .), the decay (T, H, K or 1), write (T, H)."""
    (T, H, K), V = k.shape, v.shape[-1]
    decay = np.exp(np.broadcast_to(log_decay, (T, H, K)))
    write = np.broadcast_to(write, (T, H))
    S, out = np.zeros((H, K, V)), []
    for t in range(T):
        S = decay[t][..., None] * S
        u = v[t] - np.einsum("hkv,hk->hv", S, k[t]) if delta else v[t]
        S = S + write[t][:, None, None] * k[t][..., None] * u[:, None]
        out.append(np.einsum("hkv,hk->hv", S, q[t]))
    return np.stack(out)


def grouped(x, heads):
    return np.repeat(x, heads // x.shape[1], axis=1)


def delta_inputs(w, x):
    q, k = (l2(conv(w, f"{name}_conv", linear(w, name, x))) for name in ("query", "key"))
    return q / np.sqrt(q.shape[-1]), k, conv(w, "value_conv", linear(w, "value", x))


def gated_delta(c, w, x):
    """An equation of the paper's chunked form prints the causal mask without the decay; a loop over tokens has no such mask."""
    q, k, v = delta_inputs(w, x)
    decay = -np.exp(w["A_log"]) * softplus(linear(w, "decay", x) + w["dt_bias"])
    beta = 2 * sigmoid(linear(w, "beta", x))
    o = memory(grouped(q, c.num_heads), grouped(k, c.num_heads), v, log_decay=decay[..., None], write=beta, delta=True)
    return linear(w, "output", rms(o) * w["norm.scale"] * silu(linear(w, "gate", x)))


def delta_net(c, w, x):
    q, k, v = delta_inputs(w, x)
    o = memory(q, k, v, write=sigmoid(linear(w, "beta", x)), delta=True)
    return linear(w, "output", rms(o) * w["norm.scale"])


def kimi_delta(c, w, x):
    q, k, v = delta_inputs(w, x)
    pre = linear(w, "decay_out", linear(w, "decay_in", x)) + w["dt_bias"]
    rate = np.exp(w["A_log"])[:, None]
    decay = -rate * softplus(pre) if c.decay_bound is None else c.decay_bound * sigmoid(rate * pre)
    o = memory(q, k, v, log_decay=decay, write=sigmoid(linear(w, "beta", x)), delta=True)
    gate = sigmoid(linear(w, "gate_out", linear(w, "gate_in", x)))
    return linear(w, "output", rms(o) * w["norm.scale"] * gate)


def mamba2(c, w, x):
    """The released step of one token does not limit the step size as the released pass over a row does."""
    u, write, read = (conv(w, f"{name}_conv", linear(w, name, x)) for name in ("value", "write", "read"))
    step = softplus(linear(w, "step_size", x) + w["dt_bias"])
    step = step if c.step_limit is None else np.clip(step, *c.step_limit)
    decay = -np.exp(w["A_log"]) * step
    y = memory(grouped(read, c.num_heads), grouped(write, c.num_heads), step[..., None] * u, log_decay=decay[..., None])
    y = (y + w["skip"][:, None] * u) * silu(linear(w, "gate", x))
    return linear(w, "output", rms(y.reshape(len(x), c.num_groups, -1), 1e-5).reshape(y.shape) * w["norm_scale"])


def gated_linear_attention(c, w, x):
    q, k, v = (linear(w, name, x) for name in ("query", "key", "value"))
    decay = np.log(sigmoid(linear(w, "decay_out", linear(w, "decay_in", x)))) / c.temperature
    o = memory(q / np.sqrt(c.key_dim), k, v, log_decay=decay)
    return linear(w, "output", rms(o) * w["norm.scale"] * silu(linear(w, "gate", x)))


def retention(c, w, x):
    q, k, v = (linear(w, name, x) for name in ("query", "key", "value"))
    q, k = (rotated(part, np.arange(len(x))) for part in (q, k))
    if c.decay == "constant":
        decay = np.log(1 - 2.0 ** (-5 - np.arange(c.num_heads)))[:, None]
    else:
        decay = np.log(sigmoid(linear(w, "decay", x)))[..., None] / 16
    o = memory(q / np.sqrt(c.key_dim), k, v, log_decay=decay)
    return linear(w, "output", rms(o, 1e-5) * silu(linear(w, "gate", x)))


def hedgehog(w, name, x):
    half = np.einsum("thk,hkf->thf", x, w[f"{name}.kernel"])
    return np.concatenate([np.exp(half), np.exp(-half)], -1)


def weighted(q, k, v, decay=0.0):
    """Linear attention with its denominator; decay (T, H, 1)."""
    ones = np.ones((*v.shape[:2], 1))
    return memory(q, k, v, log_decay=decay) / memory(q, k, ones, log_decay=decay)


def linear_attention(c, w, x):
    q, k, v = (linear(w, name, x) for name in ("query", "key", "value"))
    if c.features == "hedgehog":
        q, k = hedgehog(w, "query_map", q), hedgehog(w, "key_map", k)
    elif c.features == "elu":
        q, k = (np.where(part > 0, part + 1, np.exp(part)) for part in (q, k))
    elif c.features == "relu":
        q, k = np.maximum(q, 0), np.maximum(k, 0)
    o = weighted(q, k, v) if c.normalizer == "sum" else rms(memory(q, k, v)) * w["norm.scale"]
    return linear(w, "output", o)


def mlstm(c, w, x):
    q, k, v = (linear(w, name, x) for name in ("query", "key", "value"))
    cap = lambda gate: c.gate_soft_cap * np.tanh(gate / c.gate_soft_cap)  # noqa: E731
    write = np.exp(cap(linear(w, "input_gate", x) + w["input_bias"]))
    forget = np.log(sigmoid(cap(linear(w, "forget_gate", x) + w["forget_bias"])))[..., None]
    q = q / np.sqrt(c.key_dim)
    total = memory(q, k, np.ones((*v.shape[:2], 1)), log_decay=forget, write=write)
    h = memory(q, k, v, log_decay=forget, write=write) / np.maximum(np.abs(total), 1)
    norm = layer if c.norm == "layer" else rms
    return linear(w, "output", sigmoid(linear(w, "gate", x)) * norm(h) * w["norm.scale"])


def slstm(c, w, x):
    """Each document starts for itself; released code asks whether the whole batch is at its first token."""
    u = x.reshape(len(x), c.num_heads, -1)
    pre = [np.einsum("thc,hcgd->thgd", conv(w, "conv", u), w["input_forget"]), np.einsum("thc,hcgd->thgd", u, w["cell_output"])]
    pre = np.concatenate(pre, 2) + w["bias"]
    h, cell, n, out = np.zeros(u.shape[1:]), 0.0, 0.0, []
    for t in range(len(x)):
        i, f, z, o = np.moveaxis(pre[t] + np.einsum("hc,hcgd->hgd", h, w["recurrent"]), 1, 0)
        cell, n = sigmoid(f) * cell + np.exp(i) * np.tanh(z), sigmoid(f) * n + np.exp(i)
        h = sigmoid(o) * cell / n
        out.append(h)
    return (layer(np.stack(out)) * w["norm.scale"]).reshape(x.shape)


def masked_scores(q, k, visible):
    """(N, T, S) scaled scores, -inf where not visible."""
    return np.where(visible, np.einsum("tnh,snh->nts", q, k) / np.sqrt(q.shape[-1]), -np.inf)


def window_mask(T, window=None):
    t, s = np.arange(T)[:, None], np.arange(T)
    return (s <= t) & (t - s < (window or T))


def lizard(c, w, x):
    """The printed denominator has the sinks' logits, which may be negative: their exponentials are meant. The printed recurrent
    form leaves out the normalizer that the parallel one has."""
    q, k, v = (linear(w, name, x) for name in ("query", "key", "value"))
    k, v = grouped(k, c.num_heads), grouped(v, c.num_heads)
    gate = np.log(sigmoid(linear(w, "decay", x)))[..., None]
    gla = weighted(hedgehog(w, "query_map", q), hedgehog(w, "key_map", k), v, gate)
    score = np.exp(masked_scores(q, k, window_mask(len(x), c.window)))
    total = score.sum(-1) + np.exp(w["sinks"]).sum(-1)[:, None]
    anchor = np.einsum("nts,snh->tnh", score / total[..., None], v)
    return linear(w, "output", gla + w["alpha"] * anchor)


def differential_attention(c, w, x):
    q, k, v = (linear(w, name, x) for name in ("query", "key", "value"))
    position, maps = np.arange(len(x)), []
    for i in (0, 1):
        pair = rotated(q[:, i], position), grouped(rotated(k[:, i], position), c.num_heads)
        maps.append(softmax(masked_scores(*pair, window_mask(len(x), c.window))))
    first, second = np.exp(np.sum(w["query_lambda"] * w["key_lambda"], -1))
    constant = c.lambda_init if c.depth is None else 0.8 - 0.6 * np.exp(-0.3 * c.depth[0])
    attention = maps[0] - (first - second + constant) * maps[1]
    o = np.einsum("nts,snh->tnh", attention, grouped(v, c.num_heads))
    return linear(w, "output", (1 - constant) * rms(o, 1e-5) * w["norm.scale"])


def mixture_of_memories(c, w, x):
    """Released code convolves over the sorted stream, across memories and back in time, and has a variant whose capacity drops
    tokens by what comes later; here convolutions run over neighbours, and nothing is dropped."""
    T, H = len(x), c.num_heads
    q, k, v = (conv(w, f"{name}_conv", linear(w, name, x)) for name in ("query", "key", "value"))
    if c.rule in ("gated_delta", "delta"):
        q, k = l2(q), l2(k)
    probability = softmax(linear(w, "router", x))
    out = np.zeros((T, H, c.values))
    for m in range(c.memories):
        shared = m == c.num_memories
        chosen = np.argsort(-probability, -1)[:, : c.memories_per_token]
        takes = np.flatnonzero((chosen == m).any(-1) | shared)
        if not len(takes):
            continue
        # A memory is a recurrence over its own tokens, which do not know of the others.
        own, gates = x[takes], {"delta": c.rule in ("gated_delta", "delta")}
        if gates["delta"]:
            gates["write"] = sigmoid(linear(w, "beta", own)[:, :, m])
        if c.rule == "gated_delta":
            pre = linear(w, "decay", own)[:, :, m] + w["dt_bias"]
            gates["log_decay"] = (-np.exp(w["A_log"]) * softplus(pre))[..., None]
        elif c.rule == "gated_linear":
            gates["log_decay"] = np.log(sigmoid(linear(w, "decay", own)[:, :, m])) / 16
        read = memory(q[takes] / np.sqrt(c.key_dim), k[takes, :, m], v[takes, :, m], **gates)
        total = np.take_along_axis(probability, chosen, -1).sum(-1)
        weight = np.ones(T) if shared else probability[:, m] / total
        out[takes] += weight[takes, None, None] * read
    return linear(w, "output", rms(out) * w["norm.scale"] * silu(linear(w, "gate", x)))


def rat(c, w, x):
    """The released step of one token transposes wrongly where a chunk starts, and its prefill needs whole chunks."""
    tiled = lambda part: np.stack([part[:, n % c.num_groups] for n in range(c.num_heads)], 1)  # noqa: E731
    q, k, v = tiled(linear(w, "query", x)), tiled(linear(w, "key", x)), linear(w, "value", x)
    g = sigmoid(linear(w, "forget", x) + w["forget_bias"])
    means = {"k": [], "v": []}
    for t in range(len(x)):
        for name, part in (("k", k), ("v", v)):
            before = 0.0 if t % c.chunk == 0 else means[name][-1]
            means[name].append(g[t] * before + (1 - g[t]) * part[t])
    chunk = np.arange(len(x)) // c.chunk
    q, k, v = rotated(q, chunk), rotated(np.stack(means["k"]), chunk), np.stack(means["v"])
    last = np.arange(len(x)) % c.chunk == c.chunk - 1
    visible = (last & (chunk[:, None] > chunk)) | np.eye(len(x), dtype=bool)
    y = np.einsum("nts,snh->tnh", softmax(masked_scores(q, k, visible)), v)
    return linear(w, "output", sigmoid(linear(w, "gate", x)) * y)


small = {"num_heads": 2, "key_dim": 4, "value_dim": 6}
CASES: list[tuple[Callable, SequenceMixerConfig]] = [
    (gated_delta, GatedDelta(**small, num_key_heads=1, negative_eigenvalues=True)),
    (delta_net, DeltaNet(**small)),
    (kimi_delta, KimiDelta(**small)),
    (kimi_delta, KimiDelta(**small, decay_bound=-5.0)),
    (mamba2, Mamba2(num_heads=4, head_dim=4, state_dim=3, num_groups=2, step_limit=(0.5, 1.0))),
    (gated_linear_attention, GatedLinearAttention(**small, gate_rank=3)),
    (retention, Retention(**small)),
    (retention, Retention(**small, decay="gated")),
    (linear_attention, LinearAttention(**small, features="hedgehog")),
    (linear_attention, LinearAttention(**small)),
    (linear_attention, LinearAttention(**small, features="relu", normalizer="norm")),
    (mlstm, MLSTM(**small)),
    (mlstm, MLSTM(**small, norm="rms")),
    (slstm, SLSTM(num_heads=2, depth=0.5)),
    (lizard, Lizard(num_heads=2, num_kv_heads=1, head_dim=4, window=3)),
    (differential_attention, DifferentialAttention(num_heads=2, num_kv_heads=1, head_dim=4, window=4)),
    (differential_attention, DifferentialAttention(num_heads=2, head_dim=4, depth=(3, 2), qkv_bias=True, output_bias=True)),
    (mixture_of_memories, MixtureOfMemories(**small)),
    (mixture_of_memories, MixtureOfMemories(**small, rule="delta", shared_memory=False)),
    (mixture_of_memories, MixtureOfMemories(**small, rule="gated_linear")),
    (mixture_of_memories, MixtureOfMemories(**small, rule="linear")),
    (rat, RAT(num_heads=4, head_dim=4, chunk=3)),
    (rat, RAT(num_heads=2, head_dim=4, chunk=1)),
]


def described(config: SequenceMixerConfig):
    """The mixer with lively weights, a stream, and the row's context from token `lo` to `hi`."""
    mixer = lively(initialize(config.build(INFO), 3), 4, std=0.2)
    x = np.random.default_rng(5).standard_normal((1, sum(SIZES), INFO.d_model)).astype(np.float32)
    segments = np.repeat(np.arange(1, len(SIZES) + 1, dtype=np.int32), SIZES)[None]
    positions = np.concatenate([np.arange(size, dtype=np.int32) for size in SIZES])[None]

    def context(lo: int = 0, hi: int = sum(SIZES)) -> Context:
        part = segments[:, lo:hi]
        return Context(np.zeros_like(part), part, positions[:, lo:hi], Rules(None), False)

    return mixer, x, context


@pytest.mark.parametrize(("paper", "config"), CASES, ids=[f"{type(config).__name__}-{i}" for i, (_, config) in enumerate(CASES)])
def test_the_mixer_computes_its_papers_equations(paper, config):
    mixer, x, context = described(config)
    y = np.asarray(jax.jit(lambda x: mixer(x, context())[0])(x))[0]
    weights = {name: np.asarray(leaf, np.float64) for name, leaf in named_leaves(mixer)}
    documents = np.split(x[0].astype(np.float64), np.cumsum(SIZES)[:-1])
    expected = np.concatenate([paper(config, weights, document) for document in documents])
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "config",
    [
        Attention(num_heads=2, head_dim=4, window=1),
        DifferentialAttention(num_heads=2, num_kv_heads=1, head_dim=4),
        LinearAttention(**small, normalizer="norm"),
        Mamba2(num_heads=2, head_dim=4, state_dim=3, step_limit=(0.5, 1.0)),
        Mamba2(num_heads=2, head_dim=4, state_dim=3, conv_width=1),  # keeps no input at all
        MixtureOfMemories(**small, rule="gated_linear", shared_memory=False),
    ],
    ids=lambda config: type(config).__name__,
)
def test_options_that_no_example_has_decode(config):
    mixer, x, context = described(config)
    whole = np.asarray(jax.jit(lambda x: mixer(x, context())[0])(x))

    @jax.jit
    def in_pieces(x):
        state, parts = mixer.init_state(1, x.shape[1], x.dtype), []
        for lo, hi in ((0, 4), (4, x.shape[1])):
            y, state = mixer.step(x[:, lo:hi], state, context(lo, hi))
            parts.append(y)
        return jnp.concatenate(parts, axis=1)

    np.testing.assert_allclose(in_pieces(x), whole, rtol=0, atol=2e-5 * np.abs(whole).max())
    state = jax.tree.leaves(mixer.init_state(1, x.shape[1], x.dtype))
    kept = sum(leaf.size for leaf in state if jnp.issubdtype(leaf.dtype, jnp.floating))
    assert config.state_size(x.shape[-1], x.shape[1]) == kept
