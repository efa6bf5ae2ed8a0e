"""What two ways to the same logits may differ by."""

import pathlib

import pytest

from mlt.config.load import load_config
from mlt.verify.model import subject_of

RETNET = pathlib.Path(__file__).parents[3] / "configs/families/retnet.py"


@pytest.fixture(scope="module")
def subject():
    return subject_of(load_config(RETNET, args=["sequence_length=48"]), 0)


def test_the_tolerance_holds_where_it_is_enough(subject):
    assert subject.bound(subject.rows(0), 9e-5, 1e-4) == (1e-4, "at most 0.0001")


def test_where_it_is_not_the_bound_is_what_the_last_place_of_the_parameters_moves(subject):
    """RetNet's group norm without a gate lifts the rounding of heads that read next to nothing."""
    bound, words = subject.bound(subject.rows(0), 1.0, 1e-9)
    assert 1e-6 < bound < 1e-2
    assert f"the {bound:.1e} by which the last place of the parameters moves them" in words
