"""LongMamba: which steps are skipped, and that a skipped token leaves the state as it was."""

import jax.numpy as jnp
import numpy as np
import pytest

from mlt.evals.long_mamba import LongMamba, Skipping, calibrate
from mlt.loss import context_of
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.mamba import Mamba
from mlt.mixers.sequence.mamba2 import Mamba2
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.remat import Remat
from mlt.model.stack import Stack
from mlt.nn.param import initialize
from mlt.parallel.rules import Rules

OPTIONS = {"dtype": jnp.dtype("float32"), "remat": Remat(mode="none")}
RULES = Rules(None)
TRAINED = 12


def rows(length: int, seed: int = 0) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(seed).integers(0, 16, (2, length)).astype(np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    return {"tokens": tokens, "segment_ids": np.ones_like(tokens), "positions": positions}


@pytest.fixture(scope="module")
def model():
    ssd, selective = Mamba2(num_heads=2, head_dim=4, state_dim=4), Mamba(state_dim=3)
    stack = Stack(head=(Block(mixers=(selective,)),), period=(Block(mixers=(ssd,)),), repeats=2)
    return initialize(LMConfig(d_model=8, vocab_size=16, stack=stack).build(), 0)


@pytest.fixture(scope="module")
def steps(model):
    return calibrate(model, rows(TRAINED), RULES, **OPTIONS)


def hidden(model, batch):
    return np.asarray(model(context_of(batch, RULES, train=False), **OPTIONS)[0])


def test_calibration_sees_the_steps_of_every_layer(model, steps):
    assert [part.shape for part in steps] == [(1, 2, TRAINED, 16), (2, 2, TRAINED, 2)]
    x = model.embed(rows(TRAINED)["tokens"], jnp.float32)
    layer = model.stack.head[0].sub_layers[0]
    mixer, row = layer.mixer, layer.norm(x)
    inner = mixer.conv(mixer.value(row), context_of(rows(TRAINED), RULES, train=False))
    pre = mixer.step_out(mixer.step_in(inner)) + mixer.dt_bias[...]
    np.testing.assert_allclose(steps[0][0], np.logaddexp(0, np.asarray(pre, np.float64)), rtol=1e-5)


def test_the_threshold_follows_its_definition():
    """One channel after another: walk down the sorted steps until they add up to what they did in training."""
    rng, length, have = np.random.default_rng(0), 30, 10
    taken = rng.gamma(1.0, 0.1, (3, have, 5))
    rate = np.array([[1.0], [0.2], [20.0], [0.5], [3.0]])
    found = LongMamba(train_length=have, cutoff=0.3, clamped=0.0).thresholds(rate, taken, length)
    for i in range(5):
        total = taken[..., i].sum() / 3
        expected, summed = 0.0, 0.0
        if np.exp(-rate[i, 0] * total) > 0.3:
            for step in sorted(taken[..., i].ravel(), reverse=True):
                summed += step * length / (3 * have)
                if summed >= total:
                    expected = step
                    break
        assert found[i] == pytest.approx(expected)
    assert np.any(found > 0)
    assert np.any(found == 0)


def test_no_longer_than_in_training_is_the_same_model(model, steps):
    assert LongMamba(train_length=TRAINED).extend(model, steps, TRAINED) is model


def test_without_global_channels_nothing_moves(model, steps):
    long = rows(40)
    never = LongMamba(train_length=TRAINED, cutoff=0.999999).extend(model, steps, 40)
    np.testing.assert_array_equal(hidden(never, long), hidden(model, long))


def test_skipped_tokens_neither_decay_nor_write(model, steps):
    extended = LongMamba(train_length=TRAINED, cutoff=0.0).extend(model, steps, 40)
    long = rows(40, seed=1)  # no token of the calibration, which would lie on a threshold
    assert not np.array_equal(hidden(extended, long), hidden(model, long))
    layer = extended.stack.head[0].sub_layers[0]
    assert isinstance(layer.mixer.step_out, Skipping)
    mixer, base = layer.mixer, model.stack.head[0].sub_layers[0].mixer
    ctx = context_of(long, RULES, train=False)
    x = layer.norm(model.embed(long["tokens"], jnp.float32))
    u = np.asarray(base.conv(base.value(x), ctx), np.float64)
    step = np.logaddexp(0, np.asarray(base.step_out(base.step_in(jnp.float32(u))) + base.dt_bias[...], np.float64))
    limit = LongMamba(train_length=TRAINED, cutoff=0.0).thresholds(np.exp(np.asarray(base.A_log[...])), steps[0][0], 40)
    write, read = (np.asarray(part(jnp.float32(u)), np.float64) for part in (base.write, base.read))
    A, h, y = -np.exp(np.asarray(base.A_log[...], np.float64)), np.zeros((2, 16, 3)), []
    skipped = 0
    for t in range(40):
        delta = np.where(step[:, t] > limit, step[:, t], 0.0)
        skipped += np.sum(delta == 0)
        h = np.exp(delta[..., None] * A) * h + (delta * u[:, t])[..., None] * write[:, t, None]
        y.append(np.einsum("bin,bn->bi", h, read[:, t]) + np.asarray(base.skip[...]) * u[:, t])
    assert 0 < skipped < 2 * 40 * 16
    gate = np.asarray(base.gate(x), np.float64)
    expected = np.stack(y, 1) * gate / (1 + np.exp(-gate)) @ np.asarray(base.output.kernel[...], np.float64)
    np.testing.assert_allclose(np.asarray(mixer(x, ctx)[0]), expected, atol=2e-5 * np.abs(expected).max())


def test_a_model_without_mamba_is_refused():
    stack = Stack(period=(Block(mixers=(Attention(num_heads=2, head_dim=4),)),))
    model = initialize(LMConfig(d_model=8, vocab_size=16, stack=stack).build(), 0)
    with pytest.raises(Exception, match="no Mamba"):
        calibrate(model, rows(TRAINED), RULES, **OPTIONS)
