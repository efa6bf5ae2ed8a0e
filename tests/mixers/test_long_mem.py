"""LongMem against its equations, token by token, and its side network against the frozen model beside which it stands."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlt.config.load import load_config, sibling
from mlt.loss import context_of
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.long_mem import LongMem
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.remat import Remat
from mlt.model.stack import Stack
from mlt.nn.param import initialize, named_leaves, partition
from mlt.parallel.rules import Rules
from mlt.train.setup import describe_model
from mlt.verify.material import lively, packed_rows

CONFIG, INFO = LongMem.example()
HEADS, KV, WIDTH = CONFIG.num_heads, CONFIG.kv_heads, CONFIG.head_dim


@pytest.fixture(scope="module")
def case():
    """The mixer, a compiled (mixer, x, bank, segments, positions) -> y, and its inputs: two documents of many segments."""
    mixer = lively(initialize(CONFIG.build(INFO), 0), 1, std=0.3)
    rng, T = np.random.default_rng(2), 70
    x = rng.standard_normal((1, T, INFO.d_model)).astype(np.float32)
    bank = {name: rng.standard_normal((1, T, KV, WIDTH)).astype(np.float32) for name in ("key", "value")}
    segments = np.repeat([1, 2, 0], [47, 20, 3])[None].astype(np.int32)
    positions = np.concatenate([np.arange(47), np.arange(20), np.zeros(3)])[None].astype(np.int32)

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})
    def run(mixer, x, bank):
        batch = {"tokens": segments, "segment_ids": segments, "positions": positions}
        ctx = context_of(batch, Rules(None), train=False)
        return mixer(x, dataclasses.replace(ctx, published={"keys": bank}))[0]

    return mixer, run, x, bank, segments[0], positions[0]


def softmax(x):
    p = np.exp(x - x.max())
    return p / p.sum()


def test_the_equations(case):
    mixer, run, x, bank, segments, positions = case
    kernels = {name: np.asarray(leaf, np.float64) for name, leaf in named_leaves(mixer)}
    project = lambda name: np.einsum("td,dnh->tnh", x[0].astype(np.float64), kernels[f"{name}.kernel"])  # noqa: E731
    angle = positions[:, None] * 10_000.0 ** (-np.arange(WIDTH // 2) / (WIDTH // 2))

    def rotate(y):
        a, b = np.split(y, 2, axis=-1)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    q, k, v = rotate(project("query")), rotate(project("key")), project("value")
    gate, o = 1 / (1 + np.exp(-kernels["gate"])), np.zeros((len(positions), HEADS, WIDTH))
    chosen_somewhere = False
    for t in np.flatnonzero(segments):
        start, segment = t - positions[t], positions[t] // CONFIG.segment
        own = [s for s in range(start, t + 1) if positions[s] // CONFIG.segment == segment]
        first = segment * CONFIG.segment
        chunks = [c for c in range(0, first, CONFIG.chunk) if first - c <= CONFIG.bank]
        for n in range(HEADS):
            group = n // (HEADS // KV)
            near = softmax(k[own, group] @ q[t, n] / WIDTH**0.5) @ v[own, group]
            o[t, n] = near
            if chunks:
                held = [np.arange(start + c, start + c + CONFIG.chunk) for c in chunks]
                score = [bank["key"][0, h, group].mean(0) @ q[t, n] for h in held]
                best = np.concatenate([held[i] for i in np.argsort(score)[::-1][: CONFIG.selected]])
                chosen_somewhere |= len(chunks) > CONFIG.selected
                far = softmax(bank["key"][0, best, group] @ q[t, n] / WIDTH**0.5) @ bank["value"][0, best, group]
                o[t, n] = (1 - gate[n]) * near + gate[n] * far
    assert chosen_somewhere
    expected = np.einsum("tnh,nhd->td", o, kernels["output.kernel"])
    real = segments > 0
    np.testing.assert_allclose(run(mixer, x, bank)[0][real], expected[real], rtol=0, atol=2e-5)


def test_a_token_reads_earlier_segments_of_its_document_in_the_bank_and_nothing_else(case):
    mixer, run, x, bank, segments, positions = case
    y, number = np.asarray(run(mixer, x, bank))[0], positions // CONFIG.segment
    for document, segment in ((1, 0), (1, 3), (2, 1)):
        inside = (segments == document) & (number == segment)
        other = {name: np.where(inside[None, :, None, None], 9 * value + 1, value) for name, value in bank.items()}
        moved = (np.asarray(run(mixer, x, other))[0] != y).any(-1)
        last = (CONFIG.bank + CONFIG.segment - 1) // CONFIG.segment
        assert not moved[(segments != document) | (number <= segment) | (number > segment + last)].any()
        assert moved[(segments == document) & (number > segment) & (number < segment + last)].any()
    # Without a bank the layer is attention inside the first segment, whatever the gate.
    first = (segments > 0) & (number == 0)
    closed = jax.tree.map(lambda leaf: leaf, mixer)
    closed.gate = type(mixer.gate)(jnp.full(HEADS, -1e9))
    np.testing.assert_array_equal(np.asarray(run(closed, x, bank))[0][first], y[first])


BASE = LMConfig(
    d_model=16,
    vocab_size=40,
    stack=Stack(period=(Block(mixers=(Attention(num_heads=2, head_dim=8), SwiGLU(d_ff=16))),), repeats=4),
)


def test_a_side_network_that_adds_nothing_gives_the_frozen_model():
    configs = pathlib.Path(__file__).parents[2] / "configs"
    longmem = sibling(str(configs / "x.py"), "longmem.py")
    config, starts = longmem.model(BASE, {"segment": 8, "chunk": 2, "selected": 2, "bank": 64}, 1)
    assert starts == (0, 1, 2, 3, 1, 3)
    model = lively(initialize(config.build(), 0), 1, std=0.2)
    side = [block.sub_layers for block in model.stack.tail]
    assert type(side[1][0].mixer).__name__ == "LongMemMixer"
    silent = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 0 * leaf if "tail" in str(path) and ("output" in str(path) or "down" in str(path)) else leaf, model
    )
    batch = packed_rows(np.random.default_rng(0), rows=1, length=30, num_ids=40)
    options = {"dtype": jnp.dtype("float32"), "remat": Remat(mode="none")}

    @jax.jit
    def streams(model, silent):
        ctx = context_of(batch, Rules(None), train=False)
        x_BTD = model.embed.table[...][ctx.token_ids]
        for block in (*model.stack.head, *model.stack.middle):
            for layer in block.sub_layers[:2]:
                if type(layer.mixer).__name__ == "AttentionMixer":
                    y, _, _ = layer.mixer.call_and_publish(layer.norm(x_BTD), ctx)
                else:
                    y, _ = layer.mixer(layer.norm(x_BTD), ctx)
                x_BTD = x_BTD + y
        return x_BTD, silent.stream(ctx, **options)[0], model.stream(ctx, **options)[0]

    frozen, beside, lively_side = streams(model, silent)
    np.testing.assert_allclose(beside, frozen, rtol=0, atol=1e-5)
    assert np.abs(lively_side - frozen).max() > 0.1


def test_the_recipe_trains_the_side_network_alone():
    config = load_config(pathlib.Path(__file__).parents[2] / "configs" / "longmem.py")
    trained = {name for name, _ in named_leaves(partition(describe_model(config))[0])}
    assert trained
    assert all(name.startswith("stack.tail.") for name in trained)
    assert sum(name.endswith("mixer.gate") for name in trained) == 1
