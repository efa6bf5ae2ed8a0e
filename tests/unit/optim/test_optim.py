"""Schedules and AdamW: the published formulas, group by group."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mlt.mixers.channel.swiglu import SwiGLU
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack
from mlt.nn.param import initialize, named_leaves, partition
from mlt.optim.adamw import AdamW
from mlt.optim.schedule import WarmupCosine, WarmupStableDecay


def test_warmup_cosine():
    rate = WarmupCosine(warmup_steps=10, final_fraction=0.1).build(1.0, 110)
    assert 0 < float(rate(0)) <= 0.11
    assert float(rate(10)) == pytest.approx(1.0)
    assert float(rate(60)) == pytest.approx(0.55)
    assert float(rate(110)) == pytest.approx(0.1)
    values = [float(rate(i)) for i in range(10, 111)]
    assert values == sorted(values, reverse=True)


def test_warmup_stable_decay():
    rate = WarmupStableDecay(warmup_steps=10, decay_steps=20).build(2.0, 100)
    assert float(rate(10)) == float(rate(79)) == pytest.approx(2.0)
    assert float(rate(90)) == pytest.approx(1.0)
    assert float(rate(100)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("warmup", "decay", "steps"), [(50, 80, 100), (100, 100, 100), (0, 300, 100)])
def test_the_fall_ends_with_a_run_too_short_for_all_of_it(warmup, decay, steps):
    rate = WarmupStableDecay(warmup_steps=warmup, decay_steps=decay).build(2.0, steps)
    values = [float(rate(i)) for i in range(steps + 1)]
    assert max(values) == pytest.approx(2.0)
    assert values[-1] == pytest.approx(0.0 if warmup < steps else 2.0, abs=1e-6)
    assert values[warmup:] == sorted(values[warmup:], reverse=True)


def test_adamw_decays_matrices_only_and_follows_the_formula():
    config = LMConfig(d_model=8, vocab_size=16, stack=Stack(period=(Block(mixers=(SwiGLU(d_ff=8),)),), repeats=2))
    specs = config.build()
    trained, _ = partition(initialize(specs, 0))
    adamw = AdamW(learning_rate=0.1, weight_decay=0.5, eps=1e-8)
    optimizer = adamw.build(partition(specs)[0], WarmupCosine(warmup_steps=0, final_fraction=1.0), 10)
    grads = jax.tree.map(lambda p: jnp.full_like(p, 0.25), trained)
    state = optimizer.init(trained)
    updates, _ = optimizer.update(grads, state, trained)
    new = dict(named_leaves(optax.apply_updates(trained, updates)))
    groups = {name: spec.group for name, spec in named_leaves(specs)}
    assert {"matrix", "embedding", "vector"} <= set(groups.values())
    for name, old in named_leaves(trained):
        decay = 0.5 if groups[name] in ("matrix", "embedding") else 0.0
        # On the first step Adam's direction is the gradient's sign.
        np.testing.assert_allclose(new[name], old - 0.1 * (1.0 + decay * old), rtol=1e-5, atol=1e-6, err_msg=name)
