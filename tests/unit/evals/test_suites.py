"""`mlt eval`: the recall of a run's model is what a direct count finds, and wrong words are refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from saved_runs import save_run

from mlt.config.run import RunConfig, TrainConfig
from mlt.data.config import DataConfig
from mlt.data.synthetic import SyntheticText
from mlt.errors import UserError
from mlt.evals.recall import RecallTask
from mlt.evals.suites import RECALL, evaluate_run
from mlt.loss import context_of
from mlt.mixers.sequence.mamba2 import Mamba2
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack
from mlt.parallel.rules import Rules
from mlt.train.load import load_model

ROWS = 12


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    stack = Stack(head=(Block(mixers=(Mamba2(num_heads=2, head_dim=4, state_dim=4),)),))
    config = RunConfig(
        model=LMConfig(d_model=8, vocab_size=272, stack=stack, tie_embeddings=True),
        data=DataConfig(source=SyntheticText.example(), sequence_length=64, batch_size=2),
        train=TrainConfig(steps=1, compute_dtype="float32"),
    )
    return save_run(tmp_path_factory.mktemp("run"), config, step=7, seed=3)


def ask(run_dir, **options) -> list[list[str]]:
    said: list[str] = []
    evaluate_run(run_dir, "recall", say=said.append, **{"rows": ROWS, "seed": 5, "step": None, "long_mamba": None, **options})
    assert "step 7" in said[0]
    return [line.split() for line in said[2:]]


def test_the_printed_recall_is_the_share_of_likeliest_values(run_dir):
    lines = ask(run_dir)
    assert [(int(length), int(pairs)) for length, pairs, *_ in lines] == list(RECALL)
    config, model, _ = load_model(run_dir)
    length, pairs, found, _ = lines[0]
    ids = config.data.tokenizer.vocab_size
    rows = RecallTask(length=int(length), pairs=int(pairs), vocab_size=ids, filler="random").rows(5, "test", range(ROWS))
    hidden, _ = model(context_of(rows, Rules(None), train=False), dtype=jnp.dtype("float32"), remat=config.remat)
    likeliest, asked = np.argmax(np.asarray(model.logits(hidden)), -1), rows["weights"] > 0
    assert float(found) == pytest.approx(np.mean(likeliest[asked] == rows["targets"][asked]), abs=1e-4)


def test_rows_no_longer_than_in_training_are_asked_of_the_model_itself(run_dir):
    plain, extended = ask(run_dir), ask(run_dir, long_mamba=512)
    assert plain == extended


@pytest.mark.parametrize(("suite", "rows"), [("recal", 4), ("recall", 0)])
def test_wrong_words_are_refused(run_dir, suite, rows):
    with pytest.raises(UserError, match=f"--{'suite' if rows else 'rows'}"):
        evaluate_run(run_dir, suite, say=print, rows=rows, seed=0, step=None, long_mamba=None)
