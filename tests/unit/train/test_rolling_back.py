"""Where a run goes back to, and what it never throws away for that."""

import contextlib
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import pytest

from mlt.checkpoint.copier import DurableOptions
from mlt.checkpoint.save import Checkpointer
from mlt.config.load import load_config
from mlt.config.run import CheckpointConfig
from mlt.errors import RunFailed
from mlt.train.guard import GuardConfig
from mlt.train.rolling_back import roll_back
from mlt.train.saving import Saver
from mlt.train.skips import Course, RollBack

FROM_SEED = Course(from_seed=True)


def state(value: float) -> dict[str, Any]:
    return {"w": jnp.full(8, value, jnp.float32)}


def services(tmp_path, every: int) -> Any:
    """What a rollback and a save use of a run's services."""
    quiet = lambda *_, **__: None  # noqa: E731
    config = load_config("tests/faults/tiny.py", args=["steps=99"])
    train = config.train.replace(guard=GuardConfig(max_consecutive_skips=3))
    config = config.replace(train=train, checkpoint=CheckpointConfig(every_steps=every))
    return SimpleNamespace(
        config=config,
        setup=SimpleNamespace(fresh_state=lambda: state(0.0), tokens_per_step=1),
        watchdog=SimpleNamespace(progress=quiet),
        goodput=SimpleNamespace(during=lambda cause: contextlib.nullcontext(), rolled_back=quiet),
        skips=SimpleNamespace(advice="", in_a_row=0),
        stopping=SimpleNamespace(name=None),
        book=SimpleNamespace(tolerating=lambda what: contextlib.nullcontext(), alarms={}),
        console=SimpleNamespace(say=quiet),
        peers=SimpleNamespace(index=0),
        directory=SimpleNamespace(samples_path=tmp_path / "samples.jsonl"),
    )


def go_back(tmp_path, checkpointer: Checkpointer, first: int, every: int = 4) -> tuple[float, int]:
    """(what the state holds, step) after the three steps from `first` on were skipped."""
    sinks: Any = SimpleNamespace(rewind=lambda *_: None)
    asked = RollBack(first + 2, first, {"rows": 0})
    back, step, _ = roll_back(asked, FROM_SEED, services(tmp_path, every), checkpointer, state(0.0), sinks)
    return float(back["w"][0]), step


def put(checkpointer: Checkpointer, *steps: int, **options) -> None:
    for step in steps:
        checkpointer.save(step, state(step), data={}, meta={}, **options)
        checkpointer.close()


def test_a_run_that_came_from_its_durable_copy_goes_back_to_that(tmp_path):
    durable = DurableOptions(tmp_path / "far", 4)
    with Checkpointer(tmp_path / "lost", durable=durable) as lost:
        put(lost, 4, 8)
    with Checkpointer(tmp_path / "new", durable=durable) as checkpointer:
        assert checkpointer.restore_latest(state(0.0)).step == 8
        assert go_back(tmp_path, checkpointer, 10) == (8.0, 8)
        assert checkpointer.steps_anywhere() == [4, 8]


def test_a_run_that_has_nothing_from_before_does_not_begin_again(tmp_path):
    with Checkpointer(tmp_path / "near") as checkpointer:
        put(checkpointer, 12)
        with pytest.raises(RunFailed, match="no checkpoint from before them"):
            go_back(tmp_path, checkpointer, 10)
        assert checkpointer.steps() == [12]


def test_before_its_first_checkpoint_a_run_begins_again(tmp_path):
    with Checkpointer(tmp_path / "near") as checkpointer:
        put(checkpointer, 3)  # on request, within the row
        assert go_back(tmp_path, checkpointer, 2) == (0.0, 0)
        assert checkpointer.steps() == []


def test_a_save_within_a_row_of_skips_leaves_the_way_back(tmp_path):
    run = services(tmp_path, 4)
    with Checkpointer(tmp_path / "near", keep=1) as checkpointer:
        put(checkpointer, 4, 8)
        assert checkpointer.steps() == [8]
        run.skips.in_a_row = 2
        Saver(run, checkpointer).persist(11, state(8.0), {}, FROM_SEED)
        checkpointer.wait()
        assert checkpointer.steps() == [8, 11]
        assert go_back(tmp_path, checkpointer, 10) == (8.0, 8)
        put(checkpointer, 12)
        assert checkpointer.steps() == [12]
