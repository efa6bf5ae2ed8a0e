"""The guard's verdicts against the formula in numpy, and what the host makes of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlt.config.problems import ConfigError, check_tree
from mlt.errors import RunFailed
from mlt.train.guard import WINDOW, GuardConfig, choose, fresh_guard, judge
from mlt.train.skips import Course, Flight, RollBack, SkipWatch, way_back


def verdicts(values: np.ndarray, config: GuardConfig) -> tuple[list[bool], list[dict]]:
    """(accepted, told) of steps with these (loss, gradient norm)."""
    step = jax.jit(functools.partial(judge, config=config))
    guard, found, told = fresh_guard(), [], []
    for loss, norm in values:
        accept, guard, words = step(guard, jnp.float32(loss), jnp.float32(norm))
        found.append(bool(accept))
        told.append({name: float(value) for name, value in words.items()})
    return found, told


def expected(values: np.ndarray, sigmas: float, window: int) -> list[bool]:
    accepted: list[np.ndarray] = []
    verdict = []
    for value in values.astype(np.float32).astype(np.float64):
        past = np.array(accepted[-window:])
        fine = bool(np.isfinite(value).all())
        if fine and len(past) >= max(2, window // 2):
            fine = bool((value <= past.mean(0) + sigmas * past.std(0, ddof=1)).all())
        verdict.append(fine)
        if fine:
            accepted.append(value)
    return verdict


@pytest.mark.parametrize("window", [7, WINDOW])
def test_spikes_are_what_the_formula_says_past_the_end_of_the_ring(window):
    rng = np.random.default_rng(0)
    values = 3 + 0.1 * rng.standard_normal((400, 2))
    values[rng.integers(0, 400, 30), rng.integers(0, 2, 30)] += 0.5  # some beyond three deviations
    values[[50, 51, 200], [0, 1, 0]] = [np.nan, np.inf, -np.inf]
    found, told = verdicts(values, GuardConfig(spike_sigmas=3.0, window=window))
    assert found == expected(values, 3.0, window)
    assert 10 < found.count(False) < 100
    row = 0
    for accept, words in zip(found, told, strict=True):
        row = 0 if accept else row + 1
        assert words["guard/consecutive_skips"] == row
        assert words["guard/skipped"] == (not accept)
    assert told[-1]["guard/skipped_steps"] == found.count(False)


def test_without_sigmas_only_what_is_not_finite_is_refused():
    found, _ = verdicts(np.array([[1, 1], [1e30, 1], [1, 1e30], [np.nan, 1], [1, np.inf]]), GuardConfig())
    assert found == [True, True, True, False, False]


def test_the_old_bits_stay_under_nan():
    old = {"a": jnp.array([1.5, -0.0, jnp.nan]), "n": jnp.int32(3)}
    new = {"a": jnp.full(3, jnp.nan), "n": jnp.int32(4)}
    kept = choose(jnp.bool_(False), new, old)
    np.testing.assert_array_equal(np.asarray(kept["a"]).view(np.uint32), np.asarray(old["a"]).view(np.uint32))
    assert int(kept["n"]) == 3
    assert int(choose(jnp.bool_(True), new, old)["n"]) == 4


def flight(step: int, row: int, **metrics: float) -> Flight:
    told = {"train/loss": 1.0, "train/grad_norm": 1.0, "guard/consecutive_skips": row, **metrics}
    before, after = ({"rows": 4 * position} for position in (step - 1, step))
    return Flight(step, told, {}, before, after)


def test_every_skip_is_described_and_the_last_one_goes_back():
    rows, lines = [], []
    watch = SkipWatch(GuardConfig(max_consecutive_skips=2), write=rows.append, say=lines.append, advice="Look.")
    watch.documents = lambda row: [(f"file.txt:{row}", 10 * row, 7)]
    assert watch.settle(flight(7, 0)) is False
    assert watch.settle(flight(8, 1, **{"train/loss": float("nan")})) is True
    with pytest.raises(RollBack) as asked:
        watch.settle(flight(9, 2, **{"train/grad_norm": 9.0, "guard/grad_norm_limit": 5.0}))
    assert (asked.value.first, asked.value.last, asked.value.position) == (8, 9, {"rows": 36})
    assert [row["step"] for row in rows] == [8, 9]
    assert rows[0]["rows"] == [28, 31]
    assert rows[0]["data"] == {"rows": 28}
    assert rows[0]["documents"][3] == {"row": 31, "document": "file.txt:31", "from_token": 310, "tokens": 7}
    assert rows[0]["reason"] == "train/loss is nan"
    assert rows[1]["reason"] == "train/grad_norm is 9, above its limit of 5"
    assert "step 9 skipped" in lines[-1]


def test_where_nothing_may_be_skipped_the_run_ends():
    watch = SkipWatch(GuardConfig(max_consecutive_skips=0), write=lambda row: None, say=print, advice="Look at it.")
    with pytest.raises(RunFailed, match=r"train/loss is inf at step 3.*max_consecutive_skips is 0.*Look at it\."):
        watch.settle(flight(3, 1, **{"train/loss": float("inf")}))


def test_the_way_back_is_that_of_a_run_that_was_never_stopped():
    assert way_back([4, 8, 12], 12, 4) == 8
    assert way_back([4, 8, 10], 12, 4) == 8  # 10 was saved on request
    assert way_back([10], 12, 4) == 10
    assert way_back([12, 16], 12, 4) == -1


def test_the_course_survives_a_checkpoint():
    course = Course(from_seed=True).back(RollBack(9, 8, {}), 4)
    assert Course.from_meta(course.meta()) == course
    assert dataclasses.asdict(Course.from_meta({})) == {"from_seed": False, "rollbacks": ()}


def test_wrong_settings_are_named():
    with pytest.raises(ConfigError) as refused:
        check_tree(GuardConfig(spike_sigmas=-1.0, window=500, max_consecutive_skips=-1, max_rollbacks=-1))
    for name in ("spike_sigmas", "window", "max_consecutive_skips", "max_rollbacks"):
        assert name in str(refused.value)
