"""An LM with a memory beside it: probabilities that add up to 1, and neither one changed where the share is 0 or 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

from mlt.cli import cli
from mlt.data.loader import DataConfig, load_corpus, validation_batches
from mlt.data.synthetic import SyntheticText
from mlt.errors import UserError
from mlt.evals.mixture import held_out
from mlt.evals.sample import sample_run
from mlt.loss import context_of
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.attention import Attention
from mlt.model.block import Block
from mlt.model.generate import generate
from mlt.model.lm import LMConfig
from mlt.model.mixture import log_mixture
from mlt.model.remat import Remat
from mlt.model.stack import Stack
from mlt.nn.param import initialize
from mlt.parallel.rules import Rules
from mlt.train.load import load_model
from mlt.verify.material import lively

FLOAT32 = jnp.dtype("float32")
BASE = LMConfig(d_model=16, vocab_size=272, stack=Stack(period=(Block(mixers=(Attention(num_heads=2, head_dim=8),)),)))
MEMORY = LMConfig(d_model=8, vocab_size=272, stack=Stack(period=(Block(mixers=(SwiGLU(d_ff=16),)),)), logit_softcap=9.0)
DATA = DataConfig(
    source=SyntheticText(num_documents=20, mean_words=20), sequence_length=32, batch_size=2, validation_fraction=0.2
)


def test_probabilities_add_up_to_one_and_the_ends_are_exact():
    rng = np.random.default_rng(0)
    logits = 5 * rng.standard_normal((2, 3, 50)).astype(np.float32)
    logits[1, 0, 7] = -np.inf
    model, memory = (jax.nn.log_softmax(part) for part in logits)
    for share in (0.25, 0.55):
        found = np.exp(np.asarray(log_mixture(model, memory, share), np.float64))
        np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
        np.testing.assert_allclose(found, (1 - share) * np.exp(model) + share * np.exp(memory), rtol=1e-5)
    np.testing.assert_array_equal(log_mixture(model, memory, 0.0), model)
    np.testing.assert_array_equal(log_mixture(model, memory, 1.0), memory)


def test_text_is_drawn_from_the_mixture_from_two_decoding_states():
    model, memory = (lively(initialize(config.build(), seed), seed, std=0.5) for seed, config in enumerate((BASE, MEMORY)))
    drawable, prompt = np.arange(272) < 256, np.array([3, 1, 4, 1, 5], np.int32)
    options = {"tokens": 8, "temperature": 0.0, "key": jax.random.key(0), "rules": Rules(None), "dtype": FLOAT32}
    options |= {"drawable_V": drawable, "end_id": 257}
    own = generate(model, prompt, **options)
    np.testing.assert_array_equal(generate(model, prompt, memory=memory, share=0.0, **options), own)
    found = generate(model, prompt, memory=memory, share=0.7, **options)
    ids = np.concatenate([prompt, found])[None, :-1]
    batch = {"tokens": ids, "segment_ids": np.ones_like(ids), "positions": np.arange(ids.shape[1])[None]}
    ctx = context_of(batch, Rules(None), train=False)
    whole = [own.logits(own(ctx, dtype=FLOAT32, remat=Remat(mode="none"))[0])[0] for own in (model, memory)]
    p = 0.3 * jax.nn.softmax(whole[0]) + 0.7 * jax.nn.softmax(whole[1])
    np.testing.assert_array_equal(found, np.argmax(p[len(prompt) - 1 :, :256], axis=-1))
    assert not np.array_equal(found, own)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, saved_run):
    folder = tmp_path_factory.mktemp("runs")
    wide = DATA.replace(sequence_length=16)
    return saved_run(folder / "base", BASE, wide, 1), saved_run(folder / "memory", MEMORY, DATA, 2)


def test_the_held_out_loss_of_a_mixture(runs):
    said = []
    lines = held_out(runs[0], say=said.append, rows=3, memory=runs[1], shares=(0.0, 0.3, 1.0))
    batches, nats, count = list(validation_batches(DATA, load_corpus(DATA), max_rows=3)), np.zeros(3), 0
    assert len(batches) == 2  # of the memory's rows; one is half empty
    models = [load_model(run)[1] for run in runs]
    for batch in batches:
        ctx = context_of(batch, Rules(None), train=False)
        p = [jax.nn.softmax(m.logits(m(ctx, dtype=FLOAT32, remat=Remat(mode="none"))[0]).astype(jnp.float32)) for m in models]
        kept = batch["weights"] > 0
        first, second = (np.take_along_axis(np.asarray(x), batch["targets"][..., None], -1)[..., 0][kept] for x in p)
        nats += [-np.log(first).sum(), -np.log(0.7 * first + 0.3 * second).sum(), -np.log(second).sum()]
        count += kept.sum()
    assert [share for share, _ in lines] == [0.0, 0.3, 1.0]
    np.testing.assert_allclose([loss for _, loss in lines], nats / count, rtol=1e-5)
    assert f"{count:,} tokens" in said[0]
    done = CliRunner().invoke(cli, ["eval", str(runs[0]), "--suite", "held-out", "--rows", "3"])
    assert done.exit_code == 0, done.output
    assert "nats a token, perplexity" in done.output


def test_what_is_refused(runs, tmp_path, saved_run):
    other = saved_run(tmp_path / "other", BASE.replace(vocab_size=288), DATA, 0)
    options = {"tokens": 2, "temperature": 0.0, "seed": 0}
    for given, text in (
        ({"share": 0.5}, "name its run with --memory"),
        ({"memory": runs[1]}, "needs --share"),
        ({"memory": runs[1], "share": 1.5}, "must lie in"),
        ({"memory": other, "share": 0.5}, "vocabulary of 288"),
    ):
        with pytest.raises(UserError, match=text):
            sample_run(runs[0], "a", **options, **given)
