"""Generation continues from states: greedy text equals the arg-max of full passes, and nothing forbidden is drawn."""

import jax
import jax.numpy as jnp
import numpy as np

from mlt.mixers.base import Context
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.gated_delta import GatedDelta
from mlt.model.block import Block
from mlt.model.generate import generate
from mlt.model.lm import LMConfig
from mlt.model.remat import Remat
from mlt.model.stack import Stack
from mlt.nn.param import initialize
from mlt.parallel.rules import Rules
from mlt.verify.material import lively

PERIOD = (
    Block(mixers=(GatedDelta(num_heads=2, key_dim=8),)),
    Block(mixers=(Attention(num_heads=2, head_dim=8, window=5), SwiGLU(d_ff=16))),
)
CONFIG = LMConfig(d_model=16, vocab_size=40, stack=Stack(period=PERIOD, repeats=2))
DRAWABLE = np.arange(36) < 32
END = 33


def draw(prompt, **options):
    model = lively(initialize(CONFIG.build(), 0), 1)
    options = {"tokens": 12, "temperature": 0.0, "key": jax.random.key(0)} | options
    found = generate(
        model, np.asarray(prompt), rules=Rules(None), dtype=jnp.dtype("float32"), drawable_V=DRAWABLE, end_id=END, **options
    )
    return model, found


def test_greedy_equals_full_passes():
    prompt = [3, 1, 4, 1, 5]
    model, found = draw(prompt)

    @jax.jit
    def next_id(ids, length):
        position = jnp.arange(ids.shape[0])
        ctx = Context(ids[None], (position < length).astype(jnp.int32)[None], position[None], Rules(None), False)
        logits = model.logits(model(ctx, dtype=jnp.dtype("float32"), remat=Remat(mode="none"))[0])
        return jnp.argmax(logits[0, length - 1, :32])

    ids = list(prompt)
    for _ in range(12):
        ids.append(int(next_id(np.pad(ids, (0, 32 - len(ids))), len(ids))))
    assert found.tolist() == ids[5:]


def test_only_allowed_ids_are_drawn_and_the_end_ends_it():
    allowed_end = DRAWABLE.copy()
    allowed_end[END] = True
    model, found = draw([1], tokens=200, temperature=50.0)
    assert len(found) == 200
    assert found.max() < 32
    assert len(np.unique(found)) > 20
    ended = generate(
        model,
        np.array([1]),
        tokens=400,
        temperature=50.0,
        key=jax.random.key(1),
        rules=Rules(None),
        dtype=jnp.dtype("float32"),
        drawable_V=allowed_end,
        end_id=END,
    )
    assert len(ended) < 400
    assert END not in ended


def test_the_key_decides():
    first, again, other = (draw([1, 2], temperature=1.0, key=jax.random.key(seed))[1] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
