"""Multi-query associative recall: the rows are what the paper says, and the score counts what it says."""

import jax.numpy as jnp
import numpy as np
import pytest

from mlt.config.base import Config
from mlt.config.problems import ConfigError, check_tree
from mlt.evals.recall import RecallTask, accuracy
from mlt.mixers.sequence.short_conv import ShortConv
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.remat import Remat
from mlt.model.stack import Stack
from mlt.nn.param import initialize
from mlt.parallel.rules import Rules


@pytest.mark.parametrize("filler", ["random", "zero"])
def test_a_row_shows_pairs_and_asks_for_each_of_them_once(filler):
    task = RecallTask(length=60, pairs=7, vocab_size=100, filler=filler)
    rows = task.rows(3, "train", range(40))
    for tokens, targets, weights in zip(rows["tokens"], rows["targets"], rows["weights"], strict=True):
        keys, values = tokens[:14:2], tokens[1:14:2]
        assert len(set(keys)) == len(set(values)) == 7
        assert keys.min() >= 1
        assert keys.max() < 50 <= values.min()
        assert values.max() < 100
        asked = np.flatnonzero(weights)
        assert len(asked) == 7
        assert asked.min() >= 14
        assert not np.any(asked % 2)
        assert dict(zip(keys, values, strict=True)) == dict(zip(tokens[asked], targets[asked], strict=True))
        rest = np.delete(tokens[14:], asked - 14)
        assert np.any(rest) == (filler == "random")
        assert tokens.max() < 100


def test_rows_are_pure_functions_of_seed_split_and_index():
    task = RecallTask(length=32, pairs=4, vocab_size=64, filler="random")
    whole = task.rows(0, "train", range(10))
    np.testing.assert_array_equal(task.rows(0, "train", range(6, 10))["tokens"], whole["tokens"][6:])
    for other in (task.rows(0, "test", range(10)), task.rows(1, "train", range(10))):
        assert not np.any(np.all(other["tokens"][:, None] == whole["tokens"], axis=-1))
    assert len(np.unique(whole["tokens"], axis=0)) == 10


def test_early_places_are_asked_by_their_power_law():
    """Of two keys and n places, the first one drawn falls on place g with probability (g + 1)^(-0.99) over their sum."""
    task = RecallTask(length=2 + 2 * 8, pairs=1, vocab_size=16)
    rows = task.rows(0, "train", range(4000))
    place = (np.argmax(rows["weights"], axis=1) - 2) // 2
    share = (1.0 + np.arange(8)) ** -0.99
    expected = share / share.sum()
    found = np.bincount(place, minlength=8) / len(place)
    assert np.abs(found - expected).max() < 4 * np.sqrt(expected.max() / len(place))


@pytest.mark.parametrize("change", [{"length": 31}, {"length": 14}, {"pairs": 0}, {"vocab_size": 8}])
def test_impossible_tasks_are_refused(change):
    with pytest.raises(ConfigError):
        check_tree(RecallTask(**{"length": 32, "pairs": 4, "vocab_size": 64} | change), Config)


def test_the_score_counts_labels_alone():
    task = RecallTask(length=16, pairs=2, vocab_size=12, filler="random")
    model = initialize(LMConfig(d_model=8, vocab_size=12, stack=Stack(period=(Block(mixers=(ShortConv(),)),))).build(), 0)
    rows = task.rows(0, "test", range(6))
    score = accuracy(2, Rules(None), dtype=jnp.dtype("float32"), remat=Remat(mode="none"))
    from mlt.loss import context_of

    hidden, _ = model(context_of(rows, Rules(None), train=False), dtype=jnp.dtype("float32"), remat=Remat(mode="none"))
    likeliest = np.argmax(np.asarray(model.logits(hidden)), -1)
    asked = rows["weights"] > 0
    assert float(score(model, rows)) == pytest.approx(np.mean(likeliest[asked] == rows["targets"][asked]))
    answered = {**rows, "targets": np.where(asked, likeliest, rows["targets"]).astype(np.int32)}
    assert float(score(model, answered)) == 1.0
