"""Mixers with diagonal or fixed dynamics against the equations of their papers: a loop over tokens in float64."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlt.errors import UserError
from mlt.mixers.base import BuildInfo, Context, SequenceMixerConfig
from mlt.mixers.channel.moe import MoE
from mlt.mixers.sequence.bmojo import BMojo
from mlt.mixers.sequence.gss import GSS
from mlt.mixers.sequence.lmu import LMU, legendre_system
from mlt.mixers.sequence.mamba import Mamba
from mlt.mixers.sequence.mem_mamba import MemMamba
from mlt.mixers.sequence.parallel import Parallel
from mlt.mixers.sequence.rg_lru import RGLRU, bounded_sqrt
from mlt.mixers.sequence.s4d import S4D
from mlt.mixers.sequence.s5 import LRU, S5
from mlt.mixers.sequence.short_conv import ShortConv
from mlt.mixers.sequence.zamba import SharedTransformer, ZambaLayer
from mlt.mixers.state_space import legs_spectrum, poles
from mlt.nn.param import initialize, named_leaves
from mlt.parallel.mesh import Layout
from mlt.parallel.rules import Rules
from mlt.verify.material import lively

INFO = BuildInfo(d_model=12, num_sub_layers=4, vocab_size=8)
SIZES = (37, 1, 5)
"""Tokens of the row's documents; the first is longer than a chunk of any of these layers."""

Weights = dict[str, np.ndarray]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.log1p(np.exp(x))


def gelu(x):
    return np.asarray(jax.scipy.special.erf(x / np.sqrt(2)), np.float64) / 2 * x + x / 2


def tanh_gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def linear(w: Weights, name: str, x: np.ndarray, dims: int = 1) -> np.ndarray:
    return np.tensordot(x, w[f"{name}.kernel"], dims) + w.get(f"{name}.bias", 0.0)


def rms(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    scale = w.get(f"{name}.scale")
    return x if scale is None else scale * x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6)


def conv(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    kernel = w[f"{name}.kernel"]
    front = np.concatenate([np.zeros((len(kernel) - 1, *x.shape[1:])), x])
    return sum(kernel[i] * front[i : i + len(x)] for i in range(len(kernel))) + w.get(f"{name}.bias", 0.0)


def as_complex(x):
    return x[..., 0] + 1j * x[..., 1]


def recurrence(decay, write):
    """h_t = decay_t h_{t-1} + write_t over the first dim; a decay without it is constant."""
    h, out = np.zeros_like(write[0]), []
    for t in range(len(write)):
        h = (decay[t] if decay.ndim == write.ndim else decay) * h + write[t]
        out.append(h)
    return np.stack(out)


def mamba(c, w, x):
    u = silu(conv(w, "conv", linear(w, "value", x)))
    low, write, read = (
        rms(w, f"{norm}_norm", linear(w, name, u)) for norm, name in (("step", "step_in"), ("write", "write"), ("read", "read"))
    )
    step = softplus(linear(w, "step_out", low) + w["dt_bias"])
    decay = np.exp(-step[..., None] * np.exp(w["A_log"]))
    h = recurrence(decay, (step * u)[..., None] * write[:, None])
    y = np.einsum("tdn,tn->td", h, read) + w["skip"] * u
    return linear(w, "output", y * silu(linear(w, "gate", x)))


def rg_lru(c, w, x):
    """A document's first input is not scaled, as in released code. The first decays are the code's too: the paper words their
    range otherwise."""
    u = conv(w, "conv", linear(w, "value", x))
    forget, write = (sigmoid(np.einsum("thi,hio->tho", u, w[name]) + w[f"{name}_bias"]) for name in ("forget", "write"))
    a = np.exp(-8 * forget * softplus(w["decay"]))
    scale = np.sqrt(1 - a**2)
    scale[0] = 1
    return linear(w, "output", tanh_gelu(linear(w, "gate", x)) * recurrence(a, scale * write * u), dims=2)


def core(c, w, x):
    """One system a channel: B is 1, held over a step."""
    lambdas = -np.exp(w["core.rate"]) + 1j * w["core.frequency"]
    z = lambdas * np.exp(w["core.log_step"])[:, None]
    length = getattr(c, "kernel_length", None)
    taps = 1 if length is None else np.exp(z[..., None] * np.arange(length)).sum(-1) * (np.exp(z) - 1)
    write = (np.exp(z) - 1) / lambdas / taps
    h = recurrence(np.exp(z), write * x[..., None])
    return 2 * (as_complex(w["core.readout"]) * h).sum(-1).real + w["core.skip"] * x


def glu(w, y):
    y = gelu(y)
    return linear(w, "output", y) * sigmoid(linear(w, "gate", y))


def s4d(c, w, x):
    return glu(w, core(c, w, x))


def gss(c, w, x):
    y = core(c, w, gelu(linear(w, "value", x)))
    return linear(w, "output", linear(w, "widen", y) * gelu(linear(w, "gate", x)))


def s5(c, w, x):
    lambdas = w["real"] + 1j * w["frequency"]
    z = lambdas * np.exp(w["log_step"]) * c.step_scale
    h = recurrence(np.exp(z), (np.exp(z) - 1) / lambdas * (x @ as_complex(w["write"])))
    y = 2 * (h @ as_complex(w["read"])).real + w["skip"] * x
    return y * sigmoid(linear(w, "gate", gelu(y)))


def lru(c, w, x):
    decay = np.exp(-np.exp(w["log_rate"]) + 1j * np.exp(w["log_phase"]))
    h = recurrence(decay, np.sqrt(1 - np.abs(decay) ** 2) * (x @ as_complex(w["write"])))
    return glu(w, (h @ as_complex(w["read"])).real + w["skip"] * x)


def lmu(c, w, x):
    A, B = legendre_system(c.order, c.window)
    u, m, out = np.maximum(linear(w, "signal", x), 0), np.zeros((c.order, c.num_inputs)), []
    for t in range(len(x)):
        m = A @ m + B[:, None] * u[t]
        out.append(m)
    return linear(w, "output", np.maximum(linear(w, "recall", np.stack(out), 2) + linear(w, "direct", x), 0))


def rotated(x, base=10_000.0):
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] * base ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], -1)


def softmax_read(q, keys, values):
    score = np.exp(np.stack(keys) @ q / np.sqrt(len(q)))
    return score / score.sum() @ np.stack(values)


def under(w, prefix):
    return {name.removeprefix(prefix): value for name, value in w.items() if name.startswith(prefix)}


def bmojo(c, w, x):
    y = rg_lru(c.memory, under(w, "memory."), x)
    q, k, v, faded_k, faded_v = (
        linear(w, name, source) for name, source in (("query", x), ("key", x), ("value", x), ("key", y), ("value", y))
    )
    q, k, faded_k = rotated(q), rotated(k), rotated(faded_k)
    cosine = lambda a, b: a @ b / np.sqrt((a @ a) * (b @ b))  # noqa: E731
    out = np.zeros_like(q)
    for i, n in np.ndindex(*q.shape[:2]):
        g = n // (c.num_heads // c.kv_heads)
        near, far = range(max(i - c.window + 1, 0), i + 1), range(max(i - 2 * c.window + 1, 0), i - c.window + 1)
        keys, values = [k[j, g] for j in near], [v[j, g] for j in near]
        keys += [faded_k[j, g] for j in far]
        values += [faded_v[j, g] for j in far]
        for end in range((c.interval or len(x)) - 1, i - c.window + 1, c.interval or len(x)):
            block = range(end - c.interval + 1, end + 1)
            worst = max(block, key=lambda j: 1 - cosine(v[j, g], faded_v[j - 1, g]) if j else 2)
            keys.append(k[worst, g])
            values.append(v[worst, g])
        out[i, n] = softmax_read(q[i, n], keys, values)
    return linear(w, "output", out, 2)


def pool_reads(c, w, queries, pools):
    """(T, N, H): attention of each token to the last `slots` summaries of every pool, a list by tokens."""
    out = np.zeros_like(queries)
    for t, n in np.ndindex(*queries.shape[:2]):
        seen = [s for pool in pools for s in pool[t]]
        if seen:
            keys, values = (linear(w, name, np.stack(seen))[:, n] for name in ("key", "value"))
            out[t, n] = softmax_read(queries[t, n], keys, values)
    return out


def pool(c, w, x):
    """The last `slots` summaries at each token."""
    notes, kept, at = sigmoid(linear(w, "importance", x)) * linear(w, "note", x), [], []
    for t in range(len(x)):
        if t % c.block == c.block - 1:
            kept = [*kept, notes[t - c.block + 1 : t + 1].max(0)]
        at.append(kept[-c.slots :])
    return at


def mem_mamba(c, w, x, earlier=()):
    """The appendix prints values of x in the attention to summaries; they are of the summaries. Queries are of x, one of two
    readings."""
    read = linear(w, "fuse", pool_reads(c, w, linear(w, "query", x), [pool(c, w, x)]), 2)
    inner = x + w["alpha"] * sigmoid(linear(w, "read_gate", x)) * read
    if earlier:
        own = under(w, "layers.")
        inner = inner + own["beta"] * linear(own, "fuse", pool_reads(c, own, linear(own, "query", x), earlier), 2)
    return mamba(c.memory, under(w, "memory."), inner)


CASES: list[tuple[Callable, SequenceMixerConfig]] = [
    (mamba, Mamba(state_dim=3)),
    (mamba, Mamba(state_dim=3, inner=16, step_rank=2, inner_norm=True, conv_bias=False)),
    (rg_lru, RGLRU(num_heads=2, width=16)),
    (s4d, S4D(num_states=8)),
    (s4d, S4D(num_states=4, poles="inverse", kernel_length=48)),
    (gss, GSS(num_states=3, width=6, ffn=16)),
    (s5, S5(num_states=8, num_blocks=2, step_scale=2.0)),
    (lru, LRU(num_states=8)),
    (lmu, LMU(order=6, window=20, num_inputs=2)),
    (bmojo, BMojo(num_heads=2, head_dim=4, num_kv_heads=1, window=5, interval=3, memory=RGLRU(num_heads=2))),
    (bmojo, BMojo(num_heads=2, head_dim=4, window=4, interval=None, memory=RGLRU(num_heads=2))),
    (mem_mamba, MemMamba(memory=Mamba(state_dim=2), summary_dim=6, num_heads=2, slots=3, block=4)),
]


def row(sizes: tuple[int, ...]) -> tuple[np.ndarray, Context]:
    x = np.random.default_rng(5).standard_normal((1, sum(sizes), INFO.d_model)).astype(np.float32)
    segments = np.repeat(np.arange(1, len(sizes) + 1, dtype=np.int32), sizes)[None]
    positions = np.concatenate([np.arange(size, dtype=np.int32) for size in sizes])[None]
    return x, Context(np.zeros_like(segments), segments, positions, Rules(None), False)


def described(config: SequenceMixerConfig):
    return lively(initialize(config.build(INFO), 3), 4, std=0.2)


@pytest.mark.parametrize(("paper", "config"), CASES, ids=[f"{type(config).__name__}-{i}" for i, (_, config) in enumerate(CASES)])
def test_the_mixer_computes_its_papers_equations(paper, config):
    mixer, (x, ctx) = described(config), row(SIZES)
    y = np.asarray(jax.jit(lambda x: mixer(x, ctx)[0])(x))[0]
    weights = {name: np.asarray(leaf, np.float64) for name, leaf in named_leaves(mixer)}
    documents = np.split(x[0].astype(np.float64), np.cumsum(SIZES)[:-1])
    expected = np.concatenate([paper(config, weights, document) for document in documents])
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


FORMS = {
    "S4D": S4D(num_states=8),
    "DSS": S4D(num_states=4, kernel_length=48),
    "GSS": GSS(num_states=3, width=6, ffn=16),
    "S5": S5(num_states=8),
    "LRU": LRU(num_states=8),
}


@pytest.mark.parametrize("config", FORMS.values(), ids=FORMS)
def test_scan_and_convolution_agree_in_values_and_gradients(config):
    x, ctx = row((29,))
    cotangent = np.random.default_rng(6).standard_normal(x.shape).astype(np.float32)

    def run(form):
        mixer = described(config.replace(form=form))

        def objective(mixer, x):
            y = mixer(x, ctx)[0]
            return jnp.sum(y * cotangent), y

        slopes = jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))
        grads, y = slopes(mixer, x)
        return {"y": y, "dx": grads[1], **dict(named_leaves(grads[0]))}

    scan, convolution = run("scan"), run("convolution")
    for name, value in scan.items():
        np.testing.assert_allclose(convolution[name], value, rtol=0, atol=5e-5 * np.abs(value).max(), err_msg=name)


def test_a_convolution_refuses_what_it_cannot_compute():
    mixer = described(S4D(num_states=2, form="convolution"))
    x, ctx = row((5, 3))
    assert np.isnan(np.asarray(mixer(x, ctx)[0])).all()
    # A document and its padding is one document.
    padded = dataclasses.replace(ctx, segment_ids=np.where(ctx.segment_ids == 2, 0, ctx.segment_ids))
    assert np.isfinite(np.asarray(mixer(x, padded)[0])).all()
    split = dataclasses.replace(ctx, rules=Layout(context=2).abstract_rules())
    with pytest.raises(UserError, match=r"mesh\.context = 2.*form='scan'"):
        mixer(x, split)


def test_an_empty_read_leaves_the_base_recurrence_bit_for_bit():
    mixer, (x, ctx) = described(MemMamba(memory=Mamba(state_dim=2), summary_dim=4, num_heads=2, block=4)), row(SIZES)
    mixer.alpha[...] = jnp.zeros(1)
    both = jax.jit(lambda x: (mixer(x, ctx)[0], mixer.memory(x, ctx)[0]))
    np.testing.assert_array_equal(*both(x))


def test_a_layer_reads_what_two_earlier_ones_made_of_the_past():
    config = MemMamba(memory=Mamba(state_dim=2), summary_dim=6, num_heads=2, slots=3, block=4)
    reader, (x, ctx) = described(config.replace(sources=("a", "b"))), row(SIZES)
    weights = {name: np.asarray(leaf, np.float64) for name, leaf in named_leaves(reader)}
    published, documents, earlier = {}, np.split(x[0].astype(np.float64), np.cumsum(SIZES)[:-1]), []
    for seed, name in enumerate(("a", "b")):
        other = lively(initialize(config.replace(publish=name).build(INFO), seed + 7), seed + 8, std=0.2)
        other_x = np.random.default_rng(seed + 9).standard_normal(x.shape).astype(np.float32)
        published |= other.call_and_publish(other_x, ctx)[2]
        w = {name: np.asarray(leaf, np.float64) for name, leaf in named_leaves(other)}
        parts = np.split(other_x[0].astype(np.float64), np.cumsum(SIZES)[:-1])
        earlier.append([pool(config, w, part) for part in parts])
    y = np.asarray(reader(x, dataclasses.replace(ctx, published=published))[0])[0]
    expected = [mem_mamba(config, weights, part, pools) for part, *pools in zip(documents, *earlier, strict=True)]
    expected = np.concatenate(expected)
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_the_legs_spectrum_is_that_of_the_matrix():
    order = 8
    n = np.arange(order)
    root = np.sqrt(2 * n + 1.0)
    A = -np.tril(np.outer(root, root), -1) - np.diag(n + 1.0)
    normal = A + np.outer(root, root) / 2
    np.testing.assert_allclose(normal + normal.T, -np.eye(order), atol=1e-12)
    lambdas, vectors = legs_spectrum(order)
    np.testing.assert_allclose(normal @ vectors, vectors * lambdas, atol=1e-12)
    # Half of each conjugate pair: twice the real part rebuilds the matrix.
    np.testing.assert_allclose(2 * (vectors * lambdas @ vectors.conj().T).real, normal, atol=1e-12)
    assert (poles("linear", 3) == -0.5 + 1j * np.pi * np.arange(3)).all()
    np.testing.assert_allclose(poles("inverse", 2), -0.5 + 1j * 4 / np.pi * (4 / np.array([1, 3]) - 1))
    assert (poles("real", 3) == -np.arange(1, 4)).all()


def test_the_legendre_memory_remembers_its_window():
    order, window = 12, 50
    A, B = legendre_system(order, window)
    assert np.abs(np.linalg.eigvals(A)).max() < 1
    signal = np.sin(np.arange(200) * 0.12)
    m = np.zeros(order)
    for u in signal:
        m = A @ m + B * u
    lag = np.linspace(0.1, 0.9, 9)
    recalled = np.polynomial.legendre.legval(2 * lag - 1, m)
    # A held input is half a token late.
    np.testing.assert_allclose(recalled, np.sin((199.5 - lag * window) * 0.12), atol=5e-3)


def test_the_square_root_of_rg_lru_has_a_bounded_slope():
    slope = jax.vmap(jax.grad(bounded_sqrt))(jnp.array([0.25, 1e-4, 1e-9, 0.0]))
    np.testing.assert_allclose(slope, [1.0, 50.0, 1000.0, 1000.0], rtol=1e-6)


def test_initial_values_are_the_papers():
    info = BuildInfo(d_model=64, num_sub_layers=4, vocab_size=8)
    made = lambda config: dict(named_leaves(initialize(config.build(info), 0)))  # noqa: E731

    w = made(Mamba())
    step = np.log1p(np.exp(np.asarray(w["dt_bias"], np.float64)))
    assert step.min() > 0.9e-3
    assert step.max() < 0.11
    assert 0.3 < (np.log(step) < np.log(0.01)).mean() < 0.7
    np.testing.assert_allclose(np.exp(w["A_log"]), np.broadcast_to(np.arange(1, 17), (128, 16)), rtol=1e-6)
    assert np.abs(w["step_out.kernel"]).max() <= 0.5
    assert w["step_in.kernel"].shape == (128, 4)
    w = made(RGLRU(num_heads=4))
    radius = np.exp(-np.log1p(np.exp(np.asarray(w["decay"], np.float64))))
    assert radius.min() > 0.899
    assert radius.max() < 0.9995
    w = made(S5(num_states=64, num_blocks=4))
    # B and C are real before the change of basis, which keeps their size.
    assert np.sum(w["write"] ** 2) == pytest.approx(64, rel=0.1)
    assert np.sum(w["read"] ** 2) == pytest.approx(32, rel=0.1)
    w = made(LRU(num_states=256))
    radius = np.exp(-np.exp(np.asarray(w["log_rate"], np.float64)))
    assert radius.min() > 0.899
    assert radius.max() < 0.9995
    assert np.mean(radius**2) == pytest.approx((0.81 + 0.998) / 2, abs=0.01)


@pytest.mark.parametrize("config", [S4D(num_states=4), GSS(num_states=4), S5(num_states=4), LRU(num_states=4)])
def test_no_parameter_of_a_linear_system_is_decayed(config):
    """Complex ones least of all: they are pairs of reals, and no matrix to an optimizer that orthogonalizes."""
    layer = ("output.", "gate.", "value.", "widen.")
    system = [(name, spec) for name, spec in named_leaves(config.build(INFO)) if not name.startswith(layer)]
    assert {spec.group for _, spec in system} == {"vector"}
    assert len(system) >= 5


@pytest.mark.parametrize(
    "config",
    [
        BMojo(num_heads=2, head_dim=4, window=4, interval=2, memory=RGLRU(num_heads=2, exchange="permute")),
        MemMamba(memory=Mamba(state_dim=2, exchange="permute"), summary_dim=4, num_heads=2, slots=2, block=2),
    ],
    ids=lambda config: type(config).__name__,
)
def test_a_memory_crosses_sequence_shards_in_the_way_that_its_config_names(config):
    mixer, (x, ctx), told = described(config), row((3, 2)), []
    mixer.memory = lambda x, ctx: told.append(ctx.rules.carry) or (x, {})
    mixer(x, ctx)
    assert told == ["permute"]


MOVING = Parallel(mixers=(ShortConv(), MoE(num_experts=4, num_experts_per_token=1, d_ff=4, global_balance_loss=0.1)))


@pytest.mark.parametrize(
    "config",
    [
        BMojo(num_heads=2, head_dim=4, window=4, interval=2, memory=MOVING),
        MemMamba(memory=MOVING, summary_dim=4, num_heads=2, slots=2, block=2),
        ZambaLayer(name="t", transformer=SharedTransformer(num_heads=2, head_dim=4, d_ff=8), memory=MOVING, adapter_rank=None),
    ],
    ids=lambda config: type(config).__name__,
)
def test_what_moves_in_a_memory_moves_with_its_layer(config):
    mixer, aux = initialize(config.build(INFO), 0), {"count/load/1": jnp.array([5, 1, 2, 0])}
    np.testing.assert_allclose(mixer.updated(aux).memory.mixers[1].router_bias[...], [-1e-3, 1e-3, 0, 1e-3], atol=1e-9)
    np.testing.assert_array_equal(mixer.within_step(aux).memory.mixers[1].load_before[...], [5, 1, 2, 0])
    np.testing.assert_array_equal(mixer.memory.mixers[1].router_bias[...], 0)
