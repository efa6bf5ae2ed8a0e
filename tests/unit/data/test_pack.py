"""Packing: rows equal a naive loop, no target is lost or doubled, and any row can be asked for first."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlt.data.order import permutation, random_words
from mlt.data.pack import EndlessRows, OnePassRows

# Ids are their own index in the flat array, so every target names the place it comes from.
lengths_of_documents = st.lists(st.integers(2, 12), min_size=1, max_size=8)


def flat(lengths):
    """tokens, starts, targets of documents of these many ids, start and end included."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return np.arange(offsets[-1]), offsets[:-1], np.diff(offsets) - 1


def naive_rows(lengths, sequence_length, count, pad_id=None):
    """Rows of the documents in order, over and over (once, with padding, if pad_id is given), one id at a time."""
    _, starts, targets = flat(lengths)
    places = []
    while len(places) < count * sequence_length:
        for document, (start, number) in enumerate(zip(starts, targets, strict=True)):
            visit = (len(places), document)
            places += [(visit, start + index) for index in range(number)]
        if pad_id is not None:
            break
    for first in range(0, count * sequence_length, sequence_length):
        row = {"tokens": [], "targets": [], "weights": [], "segment_ids": [], "positions": []}
        visit_before, segment, position = None, 0, 0
        for visit, index in places[first : first + sequence_length]:
            segment, position = (segment, position + 1) if visit == visit_before else (segment + 1, 0)
            visit_before = visit
            for name, value in zip(row, (index, index + 1, 1, segment, position), strict=True):
                row[name].append(value)
        for name, value in zip(row, (pad_id, pad_id, 0, 0, 0), strict=True):
            row[name] += [value] * (sequence_length - len(row[name]))
        yield row


def assert_rows_equal(actual, expected):
    assert list(actual) == list(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(actual[name], values, err_msg=name)
        assert actual[name].dtype == (np.float32 if name == "weights" else np.int32)


@settings(max_examples=80, deadline=None)
@given(lengths_of_documents, st.integers(1, 30))
def test_rows_in_document_order_equal_a_naive_loop(lengths, sequence_length):
    rows = EndlessRows(
        *flat(lengths),
        sequence_length=sequence_length,
        key=(0,),
        shuffle_documents=False,
        shuffle_block_rows=1,
    )
    for index, expected in enumerate(naive_rows(lengths, sequence_length, 7)):
        assert_rows_equal(rows[index], expected)


@settings(max_examples=80, deadline=None)
@given(lengths_of_documents, st.integers(1, 30))
def test_one_pass_equals_a_naive_loop_with_padding(lengths, sequence_length):
    rows = OnePassRows(*flat(lengths), sequence_length=sequence_length, pad_id=999)
    assert len(rows) == -(-sum(length - 1 for length in lengths) // sequence_length)
    expected = list(naive_rows(lengths, sequence_length, len(rows), pad_id=999))
    for index in reversed(range(len(rows))):
        assert_rows_equal(rows[index], expected[index])


@settings(max_examples=80, deadline=None)
@given(lengths_of_documents, st.integers(1, 30), st.integers(0, 3))
def test_shuffled_epochs_hold_every_target_once(lengths, sequence_length, seed):
    tokens, starts, targets = flat(lengths)
    rows = EndlessRows(tokens, starts, targets, sequence_length=sequence_length, key=(seed,))
    epoch = int(targets.sum())
    count = -(-3 * epoch // sequence_length)
    line = np.concatenate([rows[index]["targets"] for index in range(count)])
    every = np.setdiff1d(tokens, starts)  # each id but the first of a document is a target
    for number in range(3):
        here = line[number * epoch : (number + 1) * epoch]
        np.testing.assert_array_equal(np.sort(here), every)


@settings(max_examples=80, deadline=None)
@given(lengths_of_documents, st.integers(1, 30), st.integers(1, 9), st.integers(0, 50))
def test_packing_invariants(lengths, sequence_length, block_rows, index):
    tokens, starts, targets = flat(lengths)
    row = EndlessRows(tokens, starts, targets, sequence_length=sequence_length, key=(1,), shuffle_block_rows=block_rows)[index]
    assert all(values.shape == (sequence_length,) for values in row.values())
    assert (row["weights"] == 1).all()
    np.testing.assert_array_equal(row["targets"], row["tokens"] + 1)
    document = np.searchsorted(starts, row["tokens"], side="right")
    np.testing.assert_array_equal(document, np.searchsorted(starts, row["targets"], side="right"))
    new = np.diff(row["segment_ids"], prepend=0)
    assert row["segment_ids"][0] == 1
    assert set(new.tolist()) <= {0, 1}
    assert (row["positions"][new == 1] == 0).all()
    inside = np.flatnonzero(new == 0)
    np.testing.assert_array_equal(row["positions"][inside], row["positions"][inside - 1] + 1)
    np.testing.assert_array_equal(row["tokens"][inside], row["tokens"][inside - 1] + 1)
    # Only the first segment of a row may start inside a document, and only the last may stop inside one.
    later = np.flatnonzero(new == 1)[1:]
    assert np.isin(row["tokens"][later], starts).all()
    assert np.isin(row["targets"][later - 1], starts + targets).all()


def make(seed=0, block_rows=16, lengths=(30, 5, 90, 2, 41), sequence_length=8):
    return EndlessRows(*flat(lengths), sequence_length=sequence_length, key=(seed,), shuffle_block_rows=block_rows)


def test_row_blocks_are_permutations_of_the_unshuffled_rows():
    plain, shuffled = make(block_rows=1), make()
    for block in range(12):
        indices = range(16 * block, 16 * block + 16)
        plain_rows = [plain[index]["targets"].tolist() for index in indices]
        shuffled_rows = [shuffled[index]["targets"].tolist() for index in indices]
        assert sorted(plain_rows) == sorted(shuffled_rows)
        assert plain_rows != shuffled_rows


def test_any_row_first_gives_the_same_row():
    first, rows = make(), make()
    forward = [first[index] for index in range(400)]
    for index in random_words(200, "order").astype(np.int64) % 400:
        assert_rows_equal(rows[int(index)], forward[index])


def test_orders_differ_by_epoch_and_seed():
    lengths = [3] * 50  # 100 targets an epoch, so a row of 100 is an epoch
    rows = make(lengths=lengths, sequence_length=100, block_rows=1)
    other = make(seed=1, lengths=lengths, sequence_length=100, block_rows=1)
    assert not np.array_equal(rows[0]["tokens"], rows[1]["tokens"])
    assert not np.array_equal(rows[0]["tokens"], other[0]["tokens"])


def test_long_rows_far_into_the_stream():
    rows = make(lengths=[3, 4], sequence_length=1000, block_rows=4)
    row = rows[10**9]
    assert np.bincount(row["targets"]).tolist() == [0, 200, 200, 0, 200, 200, 200]
    assert row["segment_ids"][-1] >= 400


@pytest.mark.parametrize("count", [1, 8, 9, 40])
def test_few_long_and_many_short_pieces_fill_rows_alike(count):
    """Few pieces are copied, many gathered: both against the naive loop, in a row too short and one too long for them."""
    lengths = [2 + 5 * index % 7 for index in range(count)]
    for sequence_length in (sum(lengths) // 2 + 1, sum(lengths) + 5):
        rows = OnePassRows(*flat(lengths), sequence_length=sequence_length, pad_id=999)
        for index, expected in enumerate(naive_rows(lengths, sequence_length, len(rows), pad_id=999)):
            assert_rows_equal(rows[index], expected)


def test_one_document_alone():
    row = make(lengths=[6], sequence_length=12)[3]
    np.testing.assert_array_equal(np.bincount(row["segment_ids"])[1:].max(), 5)
    assert set(row["targets"].tolist()) == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("length", [1, 2, 3, 1000])
def test_permutation_is_one(length):
    assert sorted(permutation(length, "a", 1)) == list(range(length))


def test_permutation_never_changes():
    """Pinned: another order on another platform or numpy version would make saved positions meaningless."""
    assert permutation(10, 0, "documents", 3).tolist() == [0, 6, 2, 8, 1, 4, 7, 9, 3, 5]
