"""Best-fit packing: documents whole, rows equal to a naive packer's, found by number alone, with little padding."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlt.data.best_fit import BestFitRows, best_fit_decreasing, make_plan

lengths_of_documents = st.lists(st.integers(2, 30), min_size=1, max_size=40)


def flat(lengths):
    """tokens, starts, targets of documents of these many ids; ids are their own index."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return np.arange(offsets[-1]), offsets[:-1], np.diff(offsets) - 1


def naive_fill(lengths, capacity):
    """Room used of each row by best-fit decreasing, one piece at a time over a list of rows."""
    rows = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if sum(row) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return sorted(sum(row) for row in rows)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(20, 40))
def test_fills_rows_as_a_naive_packer_does(lengths, capacity):
    rows = best_fit_decreasing(np.array(lengths), capacity)
    filled = np.bincount(rows, weights=lengths).astype(int)
    assert sorted(filled.tolist()) == naive_fill(lengths, capacity)
    assert (filled > 0).all()  # numbered without gaps


@settings(max_examples=100, deadline=None)
@given(lengths_of_documents, st.integers(1, 30), st.integers(1, 50))
def test_every_target_once_and_no_cut_that_can_be_avoided(lengths, sequence_length, window):
    tokens, starts, targets = flat(lengths)
    plan = make_plan(starts, targets, sequence_length=sequence_length, window=window)
    covered = np.concatenate([np.arange(b, b + n) for b, n in zip(plan.begins_P, plan.lengths_P, strict=True)])
    np.testing.assert_array_equal(np.sort(covered), np.setdiff1d(tokens, starts) - 1)
    for start, count in zip(starts.tolist(), targets.tolist(), strict=True):
        mine = plan.lengths_P[(plan.begins_P >= start) & (plan.begins_P < start + count)]
        assert len(mine) == -(-count // sequence_length)
    per_row = np.add.reduceat(plan.lengths_P, plan.first_R[:-1])
    assert (per_row <= sequence_length).all()
    assert plan.padding == pytest.approx(1 - targets.sum() / (len(plan) * sequence_length))


@settings(max_examples=50, deadline=None)
@given(lengths_of_documents, st.integers(1, 30))
def test_a_window_is_planned_by_itself(lengths, sequence_length):
    """The rows of a window do not depend on the documents outside it."""
    _, starts, targets = flat(lengths)
    whole = make_plan(starts, targets, sequence_length=sequence_length, window=7)
    parts = [
        make_plan(starts[low : low + 7], targets[low : low + 7], sequence_length=sequence_length, window=100)
        for low in range(0, len(starts), 7)
    ]
    np.testing.assert_array_equal(whole.begins_P, np.concatenate([part.begins_P for part in parts]))
    np.testing.assert_array_equal(whole.lengths_P, np.concatenate([part.lengths_P for part in parts]))
    np.testing.assert_array_equal(np.diff(whole.first_R), np.concatenate([np.diff(part.first_R) for part in parts]))


def make(lengths=(30, 5, 21, 2, 9, 14, 3, 3, 17), **changed):
    settings = {"sequence_length": 16, "window": 5, "key": (0,), "shuffle_block_rows": 4, "pad_id": 999, **changed}
    return BestFitRows(*flat(lengths), **settings)


@settings(max_examples=60, deadline=None)
@given(lengths_of_documents, st.integers(2, 30), st.booleans(), st.integers(0, 60))
def test_rows_hold_whole_documents_then_padding(lengths, sequence_length, shuffle, index):
    tokens, starts, _ = flat(lengths)
    row = make(lengths, sequence_length=sequence_length, shuffle_documents=shuffle)[index]
    real = row["weights"] == 1
    used = int(real.sum())
    assert used > 0
    assert real[:used].all()
    for name, fill in (("tokens", 999), ("targets", 999), ("segment_ids", 0), ("positions", 0), ("weights", 0)):
        assert (row[name][used:] == fill).all()
    np.testing.assert_array_equal(row["targets"][:used], row["tokens"][:used] + 1)
    new = np.diff(row["segment_ids"][:used], prepend=0)
    assert set(new.tolist()) <= {0, 1}
    assert (row["positions"][:used][new == 1] == 0).all()
    inside = np.flatnonzero(new == 0)
    np.testing.assert_array_equal(row["tokens"][inside], row["tokens"][inside - 1] + 1)
    np.testing.assert_array_equal(row["positions"][inside], row["positions"][inside - 1] + 1)
    # A segment starts a document, or goes on with one whose earlier part fills rows of its own.
    first = row["tokens"][:used][new == 1]
    into = first - starts[np.searchsorted(starts, first, side="right") - 1]
    assert (into % sequence_length == 0).all()
    assert len(tokens) > row["targets"][:used].max()


@pytest.mark.parametrize("shuffle", [True, False])
def test_each_epoch_holds_every_target_once(shuffle):
    rows = make(shuffle_documents=shuffle, shuffle_block_rows=1)
    tokens, starts, _ = flat((30, 5, 21, 2, 9, 14, 3, 3, 17))
    count = len(rows.plan)
    epochs = []
    for epoch in range(3):
        found = [rows[epoch * count + index] for index in range(count)]
        epochs.append([row["tokens"].tolist() for row in found])
        targets = np.concatenate([row["targets"][row["weights"] > 0] for row in found])
        np.testing.assert_array_equal(np.sort(targets), np.setdiff1d(tokens, starts))
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert (epochs[0] == epochs[1] == epochs[2]) is not shuffle


def test_without_shuffling_rows_follow_the_documents():
    rows = make([9] * 40, shuffle_documents=False, shuffle_block_rows=1, window=8)
    firsts = [int(rows[index]["tokens"][0]) for index in range(len(rows.plan))]
    assert firsts == sorted(firsts)
    assert len(firsts) == 20


def test_any_row_first_gives_the_same_row():
    forward = [make()[index] for index in range(60)]
    rows = make()
    for index in (59, 3, 41, 0, 17, 58, 3):
        for name, values in forward[index].items():
            np.testing.assert_array_equal(rows[index][name], values)
    assert any(make(key=(1,))[index]["tokens"].tolist() != forward[index]["tokens"].tolist() for index in range(60))


def test_the_plan_never_changes():
    """Pinned: another plan from the same documents would break the resumption of every saved run."""
    lengths = [2 + 7 * index % 29 for index in range(60)]
    rows = make(lengths, window=20, sequence_length=23)
    data = b"".join(rows[index]["tokens"].astype("<i4").tobytes() for index in range(100))
    assert hashlib.sha256(data).hexdigest()[:16] == "7c17c4c963fcf993"


def test_padding_of_ordinary_documents_is_small():
    """The lengths of text spread widely; above a row's length they are cut, below they fill each other's gaps."""
    lengths = np.random.Generator(np.random.Philox(1)).lognormal(6, 1, 20_000).astype(np.int64) + 2
    plan = make_plan(np.cumsum(lengths) - lengths, lengths - 1, sequence_length=2048, window=65_536)
    assert plan.padding < 0.001
