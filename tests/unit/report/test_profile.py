"""Which steps are traced, what a trace leaves behind, and that a failing profiler stops nothing."""

import jax
import jax.numpy as jnp
import pytest

from mlt.config.problems import collect_problems
from mlt.report.profile import ProfileConfig, Profiler


def traced(profiler: Profiler, first: int, last: int) -> tuple[list[int], list[str]]:
    """Steps first + 1 to last as the loop takes them: those inside a trace, and what was said."""
    inside, said, open_ = [], [], False
    for step in range(first, last + 1):
        if step > first and open_:
            inside.append(step)
        if profiler.turns(step):
            said.append(profiler.turn(step))
            open_ = not open_
    said.append(profiler.close(last))
    return inside, [line for line in said if line]


@pytest.fixture
def calls(monkeypatch):
    found = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **options: found.append(("start", options)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: found.append(("stop", {})))
    return found


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [(0, 9, [3, 4, 5]), (3, 9, [4, 5]), (0, 4, [3, 4]), (5, 9, []), (0, 2, [])],
    ids=["whole", "resumed inside", "ends inside", "resumed behind", "ends in front"],
)
def test_the_named_steps_are_traced(calls, tmp_path, first, last, expected):
    inside, said = traced(Profiler(ProfileConfig(first_step=3, steps=3), tmp_path), first, last)
    assert inside == expected
    assert [name for name, _ in calls] == (["start", "stop"] if expected or last == 2 else [])
    assert len(said) == bool(expected)


def test_the_first_step_can_be_traced_and_none_is_without_a_config(calls, tmp_path):
    assert traced(Profiler(ProfileConfig(first_step=1, steps=2, perfetto=True), tmp_path), 0, 5)[0] == [1, 2]
    assert calls[0] == ("start", {"create_perfetto_trace": True})
    assert traced(Profiler(None, tmp_path), 0, 5) == ([], [])


def test_a_trace_is_written(tmp_path):
    profiler = Profiler(ProfileConfig(first_step=1, steps=1), tmp_path / "profile" / "0")
    assert profiler.turn(0) is None
    with jax.profiler.StepTraceAnnotation("train", step_num=1):
        jax.block_until_ready(jnp.arange(8.0) * 2)
    assert "step 1 is in" in profiler.turn(1)
    (trace,) = tmp_path.rglob("*.xplane.pb")
    assert b"train" in trace.read_bytes()


def test_a_profiler_that_fails_is_given_up(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise RuntimeError("Only one profile may be run at a time.")

    monkeypatch.setattr(jax.profiler, "start_trace", fail)
    profiler = Profiler(ProfileConfig(first_step=1), tmp_path)
    assert "training goes on" in profiler.turn(0)
    assert not profiler.turns(0)
    assert profiler.close(3) is None


@pytest.mark.parametrize("name", ["first_step", "steps"])
def test_problems(name):
    assert [problem.path for problem in collect_problems(ProfileConfig(**{name: 0}))] == [name]
