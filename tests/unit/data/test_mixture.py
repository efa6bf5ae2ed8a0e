"""Mixtures: exact shares in every block, each source's rows used once and in turn, any row without the others."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlt.config.problems import ConfigError
from mlt.data.mixture import BLOCK_SLOTS, Mixture, Schedule, Weighted, slots_per_block
from mlt.data.synthetic import SyntheticText

weights = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(weights)
def test_shares_are_exact_to_a_row(weights):
    counts = slots_per_block(weights)
    assert sum(counts) == BLOCK_SLOTS
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - BLOCK_SLOTS * weight / sum(weights)) < 1


def test_shares_of_round_weights():
    assert slots_per_block([1.0]) == (1000,)
    assert slots_per_block([3, 1]) == (750, 250)
    assert slots_per_block([1, 1, 1]) == (334, 333, 333)


@settings(max_examples=15, deadline=None)
@given(weights, st.integers(0, 5))
def test_schedule_deals_each_source_its_rows_in_turn(weights, seed):
    counts = slots_per_block(weights)
    schedule = Schedule(counts, seed)
    turns = [0] * len(counts)
    for row in range(3 * BLOCK_SLOTS):
        source, turn = schedule.locate(row)
        assert turn == turns[source]
        turns[source] += 1
        if (row + 1) % BLOCK_SLOTS == 0:
            assert turns == [count * (row + 1) // BLOCK_SLOTS for count in counts]


def test_schedule_is_random_access_and_seeded():
    counts = slots_per_block([5, 3, 2])
    forward = [Schedule(counts, 7).locate(row) for row in range(0, 5000, 97)]
    schedule = Schedule(counts, 7)
    assert [schedule.locate(row) for row in reversed(range(0, 5000, 97))] == forward[::-1]
    assert [Schedule(counts, 8).locate(row) for row in range(0, 5000, 97)] != forward


def test_schedule_mixes_within_a_block():
    """A source of half the rows is never away for long: the order is shuffled, not block after block."""
    schedule = Schedule((500, 500), 0)
    sources = "".join(str(schedule.locate(row)[0]) for row in range(BLOCK_SLOTS))
    assert "0" * 25 not in sources
    assert "1" * 25 not in sources
    assert sources != "".join(str(schedule.locate(BLOCK_SLOTS + row)[0]) for row in range(BLOCK_SLOTS))


def test_one_source_keeps_its_order():
    schedule = Schedule((1000,), 3)
    assert [schedule.locate(row) for row in (0, 1, 999, 1000, 123_456)] == [(0, row) for row in (0, 1, 999, 1000, 123_456)]


def test_a_weight_too_small_for_any_row_is_refused():
    source = SyntheticText.example()
    parts = (Weighted(source=source), Weighted(source=source, weight=1e-4))
    (problem,) = Mixture(parts=parts).problems()
    assert str(problem) == (
        "parts[1].weight = 0.0001: is less than one row in 1000 of the sum 1.0001; raise it, or leave the source out"
    )


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_weights_are_positive_and_finite(weight):
    with pytest.raises(ConfigError):
        Weighted(source=SyntheticText.example(), weight=weight)
