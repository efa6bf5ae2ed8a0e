"""Mixtures: exact shares in every block, each source's rows used once and in turn, any row without the others."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlt.config.problems import ConfigError
from mlt.data.mixture import BLOCK_SLOTS, Mixture, Schedule, Stage, Weighted, slots_per_block
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
    schedule = Schedule([(0, counts)], seed)
    turns = [0] * len(counts)
    for row in range(3 * BLOCK_SLOTS):
        source, turn = schedule.locate(row)
        assert turn == turns[source]
        turns[source] += 1
        if (row + 1) % BLOCK_SLOTS == 0:
            assert turns == [count * (row + 1) // BLOCK_SLOTS for count in counts]


def test_schedule_is_random_access_and_seeded():
    counts = slots_per_block([5, 3, 2])
    forward = [Schedule([(0, counts)], 7).locate(row) for row in range(0, 5000, 97)]
    schedule = Schedule([(0, counts)], 7)
    assert [schedule.locate(row) for row in reversed(range(0, 5000, 97))] == forward[::-1]
    assert [Schedule([(0, counts)], 8).locate(row) for row in range(0, 5000, 97)] != forward


def test_schedule_mixes_within_a_block():
    """A source of half the rows is never away for long: the order is shuffled, not block after block."""
    schedule = Schedule([(0, (500, 500))], 0)
    sources = "".join(str(schedule.locate(row)[0]) for row in range(BLOCK_SLOTS))
    assert "0" * 25 not in sources
    assert "1" * 25 not in sources
    assert sources != "".join(str(schedule.locate(BLOCK_SLOTS + row)[0]) for row in range(BLOCK_SLOTS))


def test_one_source_keeps_its_order():
    schedule = Schedule([(0, (1000,))], 3)
    assert [schedule.locate(row) for row in (0, 1, 999, 1000, 123_456)] == [(0, row) for row in (0, 1, 999, 1000, 123_456)]


def test_a_weight_too_small_for_any_row_is_refused():
    source = SyntheticText.example()
    parts = (Weighted(source=source), Weighted(source=source, weight=1e-4))
    (problem,) = Mixture(parts=parts).problems()
    assert str(problem) == (
        "parts[1].weight = 0.0001: is less than one row in 1000 of the sum 1.0001; raise it, or leave the source out"
    )


@pytest.mark.parametrize("weight", [-1.0, float("inf"), float("nan")])
def test_weights_are_finite_and_not_negative(weight):
    with pytest.raises(ConfigError):
        Weighted(source=SyntheticText.example(), weight=weight)


STAGES = [(0, (750, 250, 0)), (1300, (0, 1000, 0)), (1301, (100, 200, 700)), (4000, (1000, 0, 0)), (4700, (334, 333, 333))]


def test_stages_deal_each_source_its_rows_in_turn():
    """Found row by row: a source goes on where it stood, through every change of the weights."""
    schedule = Schedule(STAGES, 5)
    turns = [0, 0, 0]
    for row in range(7000):
        source, turn = schedule.locate(row)
        assert turn == turns[source]
        turns[source] += 1


def test_stages_have_their_shares():
    schedule = Schedule(STAGES, 5)
    counts = Counter(schedule.locate(row)[0] for row in range(1301, 3301))
    assert counts == {0: 200, 1: 400, 2: 1400}
    assert {schedule.locate(row)[0] for row in range(4000, 4700)} == {0}
    assert schedule.locate(1300)[0] == 1


def test_stages_are_random_access():
    rows = range(0, 7000, 41)
    forward = [Schedule(STAGES, 5).locate(row) for row in rows]
    schedule = Schedule(STAGES, 5)
    assert [schedule.locate(row) for row in reversed(rows)] == forward[::-1]


def test_a_later_stage_changes_no_row_before_it():
    for count in range(1, len(STAGES)):
        short, whole = Schedule(STAGES[:count], 5), Schedule(STAGES, 5)
        for row in range(0, STAGES[count][0], 7):
            assert short.locate(row) == whole.locate(row)
        assert any(short.locate(row) != whole.locate(row) for row in range(STAGES[count][0], STAGES[count][0] + 50))


def test_stages_with_broken_rules_name_every_problem():
    source = SyntheticText.example()
    parts = (Weighted(source=source, weight=0.0), Weighted(source=source), Weighted(source=source, weight=0.0))
    stages = (
        Stage(from_row=500, weights=(1.0, 1.0)),
        Stage(from_row=500, weights=(0.0, 0.0, 0.0)),
        Stage(from_row=900, weights=(1.0, 1e-4, 0.0)),
    )
    assert [str(problem) for problem in Mixture(parts=parts, stages=stages).problems()] == [
        "parts[2].weight = 0.0: is 0 in every stage; raise it, or leave the source out",
        "stages[0].weights = (1.0, 1.0): has 2 weights for 3 sources; give one a source; 0 leaves a source out",
        "stages[1].weights[0] = 0.0: and all the others are 0; give one source at least a weight",
        "stages[2].weights[1] = 0.0001: is less than one row in 1000 of the sum 1.0001; raise it, or leave the source out",
        "stages[1].from_row = 500: is not above the 500 of the stage before; put the stages in order",
    ]
    assert list(Mixture(parts=parts[:2], stages=stages[:1]).problems()) == []
