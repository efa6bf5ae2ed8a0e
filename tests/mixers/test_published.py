"""Layers that publish, read and share, in one small stack: head to scan, scan to tail, both scans; and their equations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlt.mixers.base import BuildInfo, Context
from mlt.mixers.rope_scaling import YarnRope
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.cross_attention import CrossAttention
from mlt.mixers.sequence.differential_attention import DifferentialAttention
from mlt.mixers.sequence.differential_cross_attention import DifferentialCrossAttention
from mlt.mixers.sequence.gmu import GMU
from mlt.mixers.sequence.mamba import Mamba
from mlt.mixers.sequence.mamba2 import Mamba2
from mlt.mixers.sequence.zamba import SharedTransformer, ZambaLayer
from mlt.model.block import Block
from mlt.model.count import count
from mlt.model.lm import LMConfig
from mlt.model.remat import Remat
from mlt.model.stack import Stack
from mlt.nn.param import initialize, named_leaves
from mlt.parallel.rules import Rules
from mlt.verify.causality import causality
from mlt.verify.decode import decode
from mlt.verify.isolation import alone, isolation
from mlt.verify.material import lively, packed_rows
from mlt.verify.model import Subject

D, LENGTH = 16, 40
KEYS = {"num_heads": 2, "head_dim": 8, "num_kv_heads": 1}


def blocks(*mixers) -> tuple[Block, ...]:
    return tuple(Block(mixers=(mixer,)) for mixer in mixers)


def zamba(name: str) -> ZambaLayer:
    transformer = SharedTransformer(num_heads=2, head_dim=16, d_ff=24)
    return ZambaLayer(name=name, transformer=transformer, memory=Mamba2(num_heads=2, head_dim=8, state_dim=4), adapter_rank=2)


def gated(source: str, width: int) -> GMU:
    return GMU(source=source, memory_dim=width)


def stack_of(*names: str) -> Stack:
    """Two uses of a shared block in the period and one in the tail, under these names."""
    first = Attention(**KEYS, publish="keys", publish_values="values")
    return Stack(
        head=blocks(Mamba(state_dim=4, publish="early"), first),
        period=blocks(gated("early", 2 * D), Mamba2(num_heads=2, head_dim=8, state_dim=4, publish="late"), zamba(names[0])),
        repeats=2,
        middle=blocks(Attention(**KEYS, value_residual="values", value_mix="learned")),
        upper=blocks(CrossAttention(source="keys", **KEYS)),
        upper_repeats=2,
        tail=blocks(gated("late", D), zamba(names[1])),
    )


STACK = stack_of("block", "block")
CONFIG = LMConfig(d_model=D, vocab_size=32, stack=STACK, tie_embeddings=True, embed_std=1.0)


@functools.cache
def model(config: LMConfig = CONFIG):
    return lively(initialize(config.build(), 0), 1)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(model(), Rules(None), Remat(), 32, LENGTH)


@pytest.mark.parametrize("proof", [isolation, alone, causality, decode])
def test_proofs_hold(subject, proof):
    result = proof(subject, 0)
    assert result.passed, result.facts


@functools.cache
def rows():
    return packed_rows(np.random.default_rng(0), rows=2, length=LENGTH, num_ids=32)


def objective(model, remat: Remat):
    batch = rows()
    ctx = Context(batch["tokens"], batch["segment_ids"], batch["positions"], Rules(None), True)
    hidden = model(ctx, dtype=jnp.dtype("float32"), remat=remat)[0]
    return jnp.sum(jnp.sin(hidden) * (batch["segment_ids"] > 0)[..., None])


def slopes(model, remat: Remat):
    run = jax.jit(jax.value_and_grad(lambda model: objective(model, remat)))
    value, grads = run(model)
    return float(value), {name: np.asarray(leaf) for name, leaf in named_leaves(grads)}


@pytest.fixture(scope="module")
def plain():
    return slopes(model(), Remat(mode="none"))


def test_every_parameter_has_a_gradient(plain):
    for name, grad in plain[1].items():
        assert np.isfinite(grad).all(), name
        assert grad.any(), name


def test_scans_equal_unrolled_layers(plain):
    """The same layers in a row; what a repeat publishes replaces what the one before it did."""
    unrolled = initialize(CONFIG.replace(stack=Stack(head=tuple(STACK.layers()))).build(), 5)
    scanned, places = model(), []
    for part in ("head", "period", "middle", "upper", "tail"):
        of_part = list(getattr(scanned.stack, part))
        if part in ("period", "upper"):
            of_part = [jax.tree.map(lambda leaf, r=r: leaf[r], block) for r in range(2) for block in of_part]
        places += of_part
    for index, block in enumerate(places):
        unrolled.stack.head[index] = block
    unrolled.embed, unrolled.norm, unrolled.head = scanned.embed, scanned.norm, scanned.head
    unrolled.stack.shared = scanned.stack.shared
    value = jax.jit(lambda m: objective(m, Remat(mode="none")))(unrolled)
    assert float(value) == pytest.approx(plain[0], rel=2e-6)


def test_a_shared_gradient_is_the_sum_over_its_uses_and_recomputing_changes_none(plain):
    apart = model(CONFIG.replace(stack=stack_of("one", "two")))
    together = model()
    for part in ("head", "period", "middle", "upper", "tail"):
        setattr(apart.stack, part, getattr(together.stack, part))
    apart.embed, apart.norm, apart.head = together.embed, together.norm, together.head
    apart.stack.shared["one"] = apart.stack.shared["two"] = together.stack.shared["block"]
    # The layers look their part up under their own names.
    apart.stack = jax.tree.map(lambda leaf: leaf, apart.stack)
    for block, name in ((apart.stack.period[2], "one"), (apart.stack.tail[1], "two")):
        layer = block.sub_layers[0]
        layer.shares, layer.mixer.config = (name,), layer.mixer.config.replace(name=name)
    value, found = slopes(apart, Remat(save=("mixer_out",), offload=("published",)))
    assert value == pytest.approx(plain[0], rel=1e-6)
    for name, expected in plain[1].items():
        grad = found.get(name)
        if grad is None:
            one, two = (found[name.replace("shared.block", f"shared.{use}")] for use in ("one", "two"))
            assert one.any(), name
            assert two.any(), name
            grad = one + two
        np.testing.assert_allclose(grad, expected, rtol=0, atol=1e-5 * (np.abs(expected).max() + 1e-6), err_msg=name)


def test_readers_keep_nothing_and_shared_parts_count_once():
    names = [name for name, _ in named_leaves(CONFIG.build())]
    assert sum("shared.block.query.kernel" in name for name in names) == 1
    without = STACK.replace(upper=(), tail=STACK.tail[1:])
    sizes = [count(config, config.build(), 64) for config in (CONFIG, CONFIG.replace(stack=without))]
    assert sizes[0].state_values == sizes[1].state_values
    states = [jax.eval_shape(lambda c=c: model(c).init_state(1, 64, jnp.dtype("float32"))) for c in (CONFIG,)]
    kept = sum(leaf.size for leaf in jax.tree.leaves(states) if jnp.issubdtype(leaf.dtype, jnp.floating))
    assert kept == sizes[0].state_values


INFO = BuildInfo(d_model=D, num_sub_layers=4, vocab_size=32)


def row(length: int = 12) -> tuple[Context, np.ndarray]:
    ids = np.ones((1, length), np.int32)
    ctx = Context(ids, ids, np.arange(length, dtype=np.int32)[None], Rules(None), False)
    return ctx, np.random.default_rng(3).standard_normal((1, length, D)).astype(np.float32)


def test_a_gated_memory_unit_by_its_equation():
    config = GMU(source="m", memory_dim=8, norm=True, norm_groups=2)
    mixer = lively(initialize(config.build(INFO), 0), 1)
    ctx, x = row()
    memory = np.random.default_rng(4).standard_normal((1, 12, 8)).astype(np.float32)
    y, _ = mixer(x, dataclasses.replace(ctx, published={"m": {"memory": memory}}))
    pre = x[0].astype(np.float64) @ np.asarray(mixer.gate.kernel[...], np.float64)
    product = (memory[0] * pre / (1 + np.exp(-pre))).reshape(12, 2, 4)
    normed = (product / np.sqrt((product**2).mean(-1, keepdims=True) + 1e-5)).reshape(12, 8) * mixer.norm_scale[...]
    np.testing.assert_allclose(y[0], normed @ np.asarray(mixer.output.kernel[...], np.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rotation", [{}, {"rotary_dim": 4, "rope_scaling": YarnRope(factor=4.0, original_length=8)}])
def test_cross_attention_with_the_publishers_query_is_its_attention(rotation):
    ctx, x = row()
    publisher = lively(initialize(Attention(**KEYS, **rotation, publish="k").build(INFO), 0), 1)
    reader = initialize(CrossAttention(source="k", **KEYS, **rotation).build(INFO), 0)
    reader.query, reader.output = publisher.query, publisher.output
    expected, _, published = publisher.call_and_publish(x, ctx)
    found, _ = reader(x, dataclasses.replace(ctx, published=published))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_differential_cross_attention_with_the_publishers_queries_is_its_attention():
    ctx, x = row()
    heads = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "depth": (5, 2)}
    publisher = lively(initialize(DifferentialAttention(**heads, publish="k", qkv_bias=True).build(INFO), 0), 1)
    reader = initialize(DifferentialCrossAttention(source="k", **heads, query_bias=True).build(INFO), 0)
    for name in ("query", "query_lambda", "key_lambda", "norm", "output"):
        setattr(reader, name, getattr(publisher, name))
    expected, _, published = publisher.call_and_publish(x, ctx)
    found, _ = reader(x, dataclasses.replace(ctx, published=published))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_lambda_follows_the_depth_through_a_scan():
    block = Block(mixers=(DifferentialAttention(num_heads=2, head_dim=4, depth=(1, 2)),))
    module = initialize(Stack(period=(block,), repeats=3).build(INFO), 0)
    np.testing.assert_array_equal(module.period[0].sub_layers[0].mixer.layer[...], [1, 3, 5])


@pytest.mark.parametrize("mix", ["half", "learned"])
def test_values_of_an_earlier_layer_are_mixed_in(mix):
    ctx, x = row()
    mixer = lively(initialize(Attention(**KEYS, value_residual="v", value_mix=mix).build(INFO), 0), 1)
    earlier = np.random.default_rng(4).standard_normal((1, 12, 1, 8)).astype(np.float32)
    found, _ = mixer(x, dataclasses.replace(ctx, published={"v": {"value": earlier}}))
    # Attention is linear in its values: the sum of what own and published values give alone.
    a, b = (0.5, 0.5) if mix == "half" else (float(w) for w in mixer.value_mix[...])
    own, _ = mixer(x, dataclasses.replace(ctx, published={"v": {"value": np.zeros_like(earlier)}}))
    alone = jax.tree.map(lambda leaf: leaf, mixer)
    alone.value = jax.tree.map(jnp.zeros_like, mixer.value)
    foreign, _ = alone(x, dataclasses.replace(ctx, published={"v": {"value": earlier}}))
    np.testing.assert_allclose(found, own + foreign, rtol=0, atol=1e-5)
    plain = lively(initialize(Attention(**KEYS).build(INFO), 0), 1)
    plain.query, plain.key, plain.value, plain.output = mixer.query, mixer.key, mixer.value, mixer.output
    np.testing.assert_allclose(own, b * plain(x, ctx)[0], rtol=0, atol=1e-5)
    assert a != 0.0


def test_zamba_by_its_equation():
    """t = W_down (gelu(h (W_g + A B_g)) * h (W_u + A B_u)), h = norm(W_o attention(norm([x ; e]))); y = mamba(norm(x + W t))."""
    config = zamba("s")
    mixer = lively(initialize(config.build(INFO), 0), 1)
    shared = lively(initialize(config.transformer.build(INFO), 0), 2)
    ctx, x = row()
    e = np.random.default_rng(5).standard_normal(x.shape).astype(np.float32)
    found, _ = mixer(x, dataclasses.replace(ctx, published={"embedding": {"stream": e}}, shared={"s": shared}))

    def norm(x, module):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + module.eps) * np.asarray(module.scale[...], np.float64)

    def project(x, module):
        kernel = np.asarray(module.kernel[...], np.float64)
        return np.tensordot(x, kernel, axes=module.num_in)

    both = norm(np.concatenate([x, e], -1)[0].astype(np.float64), shared.norm)
    q, k, v = (project(both, part) for part in (shared.query, shared.key, shared.value))
    scores = np.einsum("tnh,snh->nts", q, k) * (config.transformer.head_dim / 2) ** -0.5
    scores = np.where(np.tril(np.ones((12, 12), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    o = np.einsum("nts,snh->tnh", weights / weights.sum(-1, keepdims=True), v)
    h = norm(project(o, shared.mix), shared.ffn_norm)
    low = project(h, mixer.adapter.down)
    gate, up = (project(h, getattr(shared, name)) + project(low, getattr(mixer.adapter, name)) for name in ("gate", "up"))
    t = project(np.asarray(jax.nn.gelu(gate, approximate=False)) * up, shared.down)
    inner = norm(x[0] + project(t, mixer.join), mixer.norm)
    expected, _ = mixer.memory(jnp.asarray(inner[None], jnp.float32), ctx)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
