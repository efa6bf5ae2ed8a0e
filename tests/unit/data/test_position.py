"""Saved positions: taken up where every row read stays what it was, refused where one would change."""

import json

import numpy as np
import pytest

from mlt.data.loader import DataConfig, load_corpus, open_loader
from mlt.data.mixture import Mixture, Stage, Weighted
from mlt.data.synthetic import SyntheticText
from mlt.errors import UserError

ONE, TWO, THREE = (SyntheticText(num_documents=20, seed=seed, mean_words=30) for seed in (1, 2, 3))
BATCH, STOP = 12, 240  # rows of a batch, and read before the position


def mixed(*weighted, stages=()):
    return Mixture(parts=tuple(Weighted(source=source, weight=weight) for source, weight in weighted), stages=stages)


BASE = mixed((ONE, 3.0), (TWO, 1.0), stages=(Stage(from_row=100, weights=(1.0, 1.0)),))


def config(source=BASE, **settings):
    return DataConfig(
        **{
            "source": source,
            "sequence_length": 16,
            "batch_size": BATCH,
            "validation_fraction": 0.1,
            "prefetch_batches": 0,
            **settings,
        }
    )


def position(setting, rows=STOP):
    loader = open_loader(setting, load_corpus(setting))
    for _ in range(rows // BATCH):
        next(loader)
    return json.loads(json.dumps(loader.state()))


def batches(setting, count, **opening):
    loader = open_loader(setting, load_corpus(setting), **opening)
    return [next(loader)["tokens"] for _ in range(count)]


@pytest.fixture(scope="module")
def state():
    return position(config())


def test_a_position_says_what_was_read(state):
    assert (state["rows"], state["tokens"]) == (STOP, STOP * 16)
    assert state["mixture"] == [[0, [750, 250]], [100, [500, 500]]]
    assert position(config(), 96)["mixture"] == [[0, [750, 250]]]  # the change at row 100 is still to come


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_a_resumed_loader_goes_on_as_the_one_before(packing):
    setting = config(packing=packing)
    whole = batches(setting, 40)
    np.testing.assert_array_equal(batches(setting, 20, state=position(setting)), whole[20:])


@pytest.mark.parametrize(
    "later",
    [
        mixed((ONE, 3.0), (TWO, 1.0), stages=(*BASE.stages, Stage(from_row=STOP, weights=(0.0, 1.0)))),
        mixed((ONE, 3.0), (TWO, 1.0), (THREE, 0.0), stages=(
            Stage(from_row=100, weights=(1.0, 1.0, 0.0)), Stage(from_row=STOP + 5, weights=(1.0, 1.0, 2.0)),
        )),
        mixed((ONE, 6.0), (TWO, 2.0), stages=BASE.stages),
    ],
    ids=["another stage from here on", "another source from here on", "other weights of the same shares"],
)  # fmt: skip
def test_what_changes_from_the_position_on_is_accepted(state, later):
    """And the batches are those of a run that had this mixture from the start."""
    resumed = batches(config(later), 20, state=state)
    np.testing.assert_array_equal(resumed, batches(config(later), 40)[20:])
    np.testing.assert_array_equal(batches(config(later), 20), batches(config(), 20))


@pytest.mark.parametrize(
    ("later", "message"),
    [
        (
            mixed((ONE, 1.0), (TWO, 1.0), stages=BASE.stages),
            r"mixture of the 240 rows read so far differs.*\[500, 500\] from row 0",
        ),
        (
            mixed((ONE, 3.0), (TWO, 1.0)),
            r"per thousand \[750, 250\] from row 0, saved \[750, 250\] from row 0, \[500, 500\] from",
        ),
        (
            mixed((ONE, 3.0), (TWO, 1.0), stages=(*BASE.stages, Stage(from_row=239, weights=(1.0, 2.0)))),
            r"change them by a stage with from_row=240 or later",
        ),
        (
            mixed((ONE, 3.0), (TWO, 1.0), (THREE, 1.0), stages=(Stage(from_row=100, weights=(1.0, 1.0, 0.0)),)),
            r"\[600, 200, 200\] from row 0, .*saved \[750, 250, 0\] from row 0",
        ),
        (mixed((ONE, 1.0)), r"read 2 sources, this config names 1\. .*weight 0"),
        (mixed((TWO, 3.0), (ONE, 1.0), stages=BASE.stages), r"documents of a synthetic source with seed 2 differ"),
    ],
    ids=["first weights", "a stage gone", "a stage too early", "a source too early", "a source gone", "sources exchanged"],
)
def test_what_changes_a_row_already_read_is_refused(state, later, message):
    with pytest.raises(UserError, match=message):
        open_loader(config(later), load_corpus(config(later)), state=state)


def test_a_stage_may_still_change_before_its_row_comes():
    early = position(config(), 96)
    for stages in ((), (Stage(from_row=96, weights=(0.0, 1.0)),)):
        later = config(mixed((ONE, 3.0), (TWO, 1.0), stages=stages))
        np.testing.assert_array_equal(batches(later, 8, state=early), batches(later, 16)[8:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 3, "shuffle_documents": False}, r"data seed=3 \(saved 0\), shuffle_documents=False \(saved True\)"),
        ({"shuffle_block_rows": 7}, r"shuffle_block_rows=7 \(saved 1024\)"),
        ({"packing": "best_fit"}, r"packing=best_fit of 65536 documents into 16 tokens \(saved concatenate\)"),
        ({"sequence_length": 32}, r"whose mixture changed at row 100"),
    ],
)
def test_another_order_is_refused(state, changes, message):
    with pytest.raises(UserError, match=message):
        open_loader(config(**changes), load_corpus(config(**changes)), state=state)


@pytest.mark.parametrize("changes", [{"packing_window": 10}, {"sequence_length": 32}])
def test_best_fit_is_bound_to_its_window_and_length(changes):
    saved = position(config(packing="best_fit"))
    later = config(packing="best_fit", **changes)
    with pytest.raises(UserError, match=r"packing=best_fit of .*\(saved best_fit of 65536 documents into 16 tokens\)"):
        open_loader(later, load_corpus(later), state=saved)


def test_other_documents_and_damaged_positions_are_refused(state):
    other = config(mixed((ONE.replace(num_documents=21), 3.0), (TWO, 1.0), stages=BASE.stages))
    with pytest.raises(UserError, match=r"documents of a synthetic source with seed 1 differ.*hash \w+, saved \w+"):
        open_loader(other, load_corpus(other), state=state)
    lacking = {name: value for name, value in state.items() if name not in ("tokens", "sources")}
    with pytest.raises(UserError, match="lacks sources, tokens"):
        open_loader(config(), load_corpus(config()), state=lacking)
