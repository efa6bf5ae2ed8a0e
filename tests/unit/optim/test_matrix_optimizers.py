"""Muon and Adafactor: what they do to matrices, where their state lies, and that a mesh changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlt.mixers.channel.moe import MoE
from mlt.mixers.sequence.attention import Attention
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack
from mlt.nn.param import initialize, named_leaves, partition
from mlt.optim.adafactor import Adafactor
from mlt.optim.base import state_shardings
from mlt.optim.muon import Muon, matrix_sides
from mlt.optim.schedule import WarmupCosine
from mlt.parallel.mesh import Layout

MIXERS = (Attention(num_heads=4, head_dim=8), MoE(num_experts=4, num_experts_per_token=2, d_ff=8))
CONFIG = LMConfig(d_model=16, vocab_size=32, stack=Stack(period=(Block(mixers=MIXERS),), repeats=2))
CONSTANT = WarmupCosine(warmup_steps=0, final_fraction=1.0)
OPTIMIZERS = {"muon": Muon(learning_rate=0.1), "adafactor": Adafactor(learning_rate=0.1, min_dim=8)}


@pytest.fixture(scope="module")
def model():
    specs = partition(CONFIG.build())[0]
    trained, _ = partition(initialize(CONFIG.build(), 0))
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), jnp.float32), trained)
    return specs, trained, grads


def updated(optimizer, trained, grads):
    state = optimizer.init(trained)
    return jax.jit(optimizer.update)(grads, state, trained)


def test_sides_of_matrices(model):
    sides = {name: matrix_sides(spec) for name, spec in named_leaves(model[0])}
    query = sides["stack.period.0.sub_layers.0.mixer.query.kernel"]
    assert (query.reduction_axis, query.output_axis) == ((1,), (2, 3))
    output = sides["stack.period.0.sub_layers.0.mixer.output.kernel"]
    assert (output.reduction_axis, output.output_axis) == ((1, 2), (3,))
    gate = sides["stack.period.0.sub_layers.1.mixer.gate"]
    assert (gate.reduction_axis, gate.output_axis) == ((2,), (3,))
    assert sides["embed.table"] is None
    assert sides["norm.scale"] is None


def test_muon_makes_updates_orthogonal(model):
    specs, trained, grads = model
    updates, _ = updated(Muon(learning_rate=0.1, weight_decay=0.0).build(specs, CONSTANT, 10), trained, grads)
    update = dict(named_leaves(updates))["stack.period.0.sub_layers.0.mixer.query.kernel"]
    for layer in np.asarray(update).reshape(2, 16, 32):
        values = np.linalg.svd(layer, compute_uv=False)
        # Five steps of the quintic leave singular values between about 0.7 and 1.2 of their common size.
        assert values.max() / values.min() < 2
        assert np.sqrt(np.mean(layer**2)) == pytest.approx(0.1 * 0.2, rel=0.25)


def test_adafactor_keeps_means_instead_of_squares(model):
    specs, trained, _ = model
    state = OPTIMIZERS["adafactor"].build(specs, CONSTANT, 10).init(trained)
    held = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert held < sum(leaf.size for leaf in jax.tree.leaves(trained)) / 3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_mesh_changes_nothing(model, name):
    specs, trained, grads = model
    optimizer = OPTIMIZERS[name].build(specs, CONSTANT, 10)
    expected, _ = updated(optimizer, trained, grads)
    rules = Layout(fsdp=2, tensor=2, expert=2).rules()
    places = rules.param_shardings(specs)
    shardings = state_shardings(jax.eval_shape(optimizer.init, trained), specs, rules)
    state = jax.jit(optimizer.init, out_shardings=shardings)(jax.device_put(trained, places))
    found, _ = jax.jit(optimizer.update)(jax.device_put(grads, places), state, jax.device_put(trained, places))
    for (key, value), (_, other) in zip(named_leaves(expected), named_leaves(found), strict=True):
        np.testing.assert_allclose(other, value, rtol=2e-4, atol=2e-6, err_msg=key)
    split = [s for s in jax.tree.leaves(shardings) if any(axis is not None for axis in s.spec)]
    assert len(split) > 10


def test_settings_are_checked():
    assert {p.path for p in Muon(learning_rate=0.1, beta=1.0, steps=0).problems()} == {"beta", "steps"}
    assert {p.path for p in Adafactor(learning_rate=0.0, clipping=0.0).problems()} == {"learning_rate", "clipping"}
