"""The divergence from neighbours in the loss, and models whose layers start from chosen layers of another run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlt.loss import token_losses
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.attention import Attention
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.remat import Remat
from mlt.model.stack import Stack
from mlt.nn.param import initialize, named_leaves
from mlt.parallel.mesh import Layout
from mlt.parallel.rules import Rules
from mlt.parallel.sparse_divergence import sparse_divergence
from mlt.train.distill import Distill, Teacher, distilled_losses
from mlt.train.layer_starts import layer_problems, of_layers
from mlt.verify.material import lively, packed_rows


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def sparse_rows(rng, shape, width, vocab):
    """Distinct ids a token with probabilities that add up to 1; some have fewer, and the last of the first row none."""
    ids = np.argsort(rng.random((*shape, vocab)), axis=-1)[..., :width].astype(np.int32)
    p = rng.uniform(0.1, 1, (*shape, width)).astype(np.float32)
    p[:, ::2, -1] = 0
    p[0, -1] = 0
    ids[p == 0] = -1
    return ids, p / np.maximum(p.sum(-1, keepdims=True), 1e-9)


def test_the_divergence_and_its_gradient_on_one_device_and_on_eight():
    rng = np.random.default_rng(1)
    hidden, head = rng.standard_normal((4, 6, 8)).astype(np.float32), rng.standard_normal((8, 10)).astype(np.float32)
    cotangent = rng.standard_normal((4, 6)).astype(np.float32)
    ids, p = sparse_rows(rng, (4, 6), 3, 10)

    def found(rules):
        def total(hidden, head):
            apart = sparse_divergence(rules, ids, p, hidden, head, 3.0)
            return jnp.sum(apart * cotangent), apart

        return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(hidden, head)

    raw = hidden.astype(np.float64) @ head
    log_q, whole = log_softmax(3 * np.tanh(raw / 3)), np.zeros((4, 6, 10))
    for index in np.ndindex(4, 6, 3):
        whole[(*index[:2], ids[index])] += p[index]  # -1 adds 0 to the last
    expected = np.sum(np.where(whole > 0, whole * (np.log(np.where(whole > 0, whole, 1)) - log_q), 0), -1)
    mass = whole.sum(-1, keepdims=True)
    slope = cotangent[..., None] * (mass * np.exp(log_q) - whole) * (1 - np.tanh(raw / 3) ** 2)
    for rules in (Rules(None), Layout(fsdp=2, context=2, tensor=2).rules()):
        grads, apart = found(rules)
        np.testing.assert_allclose(apart, expected, rtol=0, atol=1e-5)
        assert float(apart[0, -1]) == 0
        for grad, own in zip(grads, (slope @ head.T, np.einsum("btd,btv->dv", hidden, slope)), strict=True):
            np.testing.assert_allclose(grad, own, rtol=0, atol=2e-5)


ATTENTION, FEED_FORWARD = Attention(num_heads=2, head_dim=4), SwiGLU(d_ff=8)
BASE = LMConfig(d_model=8, vocab_size=32, stack=Stack(period=(Block(mixers=(ATTENTION, FEED_FORWARD)),), repeats=4))


def test_the_loss_is_a_share_of_each_and_evaluations_have_the_data_alone():
    rng = np.random.default_rng(0)
    model, batch = lively(initialize(BASE.build(), 0), 0, std=0.3), packed_rows(rng, rows=2, length=12, num_ids=32)
    ids, p = sparse_rows(rng, (2, 12), 4, 32)
    near = {**batch, "neighbours/ids": ids, "neighbours/probabilities": p}
    options = {"dtype": jnp.dtype("float32"), "remat": Remat(mode="none"), "train": True}
    run = jax.jit

    @run
    def losses(model):
        own, _ = token_losses(model, batch, Rules(None), neighbour_weight=0.4, **options)
        mixed, aux = token_losses(model, near, Rules(None), neighbour_weight=0.4, **options)
        distill = Teacher(None, Distill(teacher="t", weight=0.0))
        taught, _ = distilled_losses(distill, model, near, Rules(None), z_loss=0.0, neighbour_weight=0.4, **options)
        return own, mixed, taught, aux["neighbours"]

    own, mixed, taught, facts = losses(model)
    np.testing.assert_array_equal(mixed, taught)
    weight = batch["weights"].sum()
    assert float(facts["metric/cross_entropy"]) == pytest.approx(float(own.sum() / weight), rel=1e-6)
    assert float(facts["metric/neighbour_kl"]) > 0.1
    expected = 0.6 * own.sum() + 0.4 * weight * facts["metric/neighbour_kl"]
    assert float(mixed.sum()) == pytest.approx(float(expected), rel=1e-5)
    assert not np.asarray(mixed)[batch["weights"] == 0].any()


def test_layers_start_from_the_layers_they_name():
    stack = Stack(
        period=BASE.stack.period, repeats=2, upper=(Block(mixers=(FEED_FORWARD,)),), upper_repeats=3, tail=BASE.stack.period
    )
    specs, other = BASE.replace(stack=stack).build(), initialize(BASE.build(), 1)
    places = {name: jax.sharding.SingleDeviceSharding(jax.devices()[0]) for name, _ in named_leaves(specs)}
    found, theirs = of_layers((0, 3, -1, -1, -1, 2), specs, other, places), dict(named_leaves(other))
    names = {name for name, _ in named_leaves(specs)}
    assert names - set(found) == {name for name in names if name.startswith("stack.upper.")}
    for name in ("embed.table", "head", "norm.scale"):
        assert found[name] is theirs[name]
    for name, array in theirs.items():
        if name.startswith("stack."):
            rest = name.removeprefix("stack.period.0.")
            np.testing.assert_array_equal(found[name], np.asarray(array)[[0, 3]])
            np.testing.assert_array_equal(found[f"stack.tail.0.{rest}"], array[2])
    for layers, text in (
        ((0, 1), "this model has 6 layers"),
        ((0, 4, -1, -1, -1, 0), "is no layer of the run"),
        ((0, -1, -1, -1, -1, 0), "they are one array"),
    ):
        problems = list(layer_problems(Distill(teacher="t", layers=layers), stack, BASE.stack))
        assert any(text in str(problem) for problem in problems), problems
    # A layer of another width is drawn.
    wide = BASE.replace(stack=Stack(period=(Block(mixers=(ATTENTION, SwiGLU(d_ff=9))),), repeats=1)).build()
    assert not any("sub_layers.1.mixer" in name for name in of_layers((1,), wide, other, places))
