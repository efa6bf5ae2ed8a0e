"""Seconds by cause over restarts and rollbacks."""

import contextlib
import json

import pytest

from mlt.report.goodput import Account
from mlt.train.goodput import Goodput


def account(*rows: dict) -> Account:
    found = Account()
    for row in rows:
        found.add(row)
    return found


def start(step: int, time: float = 0.0) -> dict:
    return {"kind": "start", "step": step, "time": time}


def spent(step: int, time: float = 0.0, /, **seconds: float) -> dict:
    return {"step": step, "time": time, "seconds": seconds}


def test_steps_after_the_last_save_are_lost_in_a_restart():
    found = account(
        *(start(0, 100), spent(10, 120, startup=5, step=10), spent(20, 140, step=20, data=1)),
        *(start(15, 200), spent(20, 210, startup=2, step=8)),
    )
    assert found.seconds["step"] == pytest.approx(10 + 10 + 8)
    assert found.seconds["lost"] == pytest.approx(10)
    assert found.seconds["startup"] == 7
    assert found.down == 60
    assert found.total == pytest.approx(5 + 30 + 1 + 2 + 8)
    assert found.goodput == pytest.approx(28 / 46)


def test_a_rollback_reaches_back_over_restarts():
    found = account(
        *(start(0), spent(10, step=10), start(10), spent(30, step=40, skipped=3)),
        *({"kind": "rollback", "step": 5}, spent(15, step=10), start(15)),
    )
    assert found.seconds["rolled_back"] == pytest.approx(40 + 5)
    assert found.seconds["step"] == pytest.approx(5 + 10)
    assert found.seconds["lost"] == 0
    assert found.seconds["skipped"] == 3


def test_nothing_is_nothing():
    assert account().goodput == 0.0
    assert account(start(0)).total == 0.0


class Clock:
    time = 0.0

    def __call__(self) -> float:
        return self.time


def test_every_second_goes_to_one_cause_and_comes_back_from_the_file(tmp_path):
    path = tmp_path / "goodput.jsonl"

    def write(row) -> None:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    clock = Clock()
    run = Goodput(path, write=write, now=clock, age=3.0)
    run.start(0)
    clock.time += 2
    with run.during("step"):
        clock.time += 10
        with run.during("data"):
            clock.time += 1
        with contextlib.suppress(ValueError), run.during("evaluation"):
            clock.time += 4
            raise ValueError
        for skipped in (False, True, False, False):
            run.stepped(skipped=skipped)
        run.note(4)
        clock.time += 6
        goodput = run.note(8)
    wanted = {"startup": 5, "step": 7.5 + 6, "skipped": 2.5, "data": 1, "evaluation": 4}
    assert {cause: seconds for cause, seconds in run.account.seconds.items() if seconds} == pytest.approx(wanted)
    assert goodput == pytest.approx(13.5 / 26)
    again = Goodput(path, write=write, now=clock, age=0.0)
    again.start(4)
    assert again.account.seconds["lost"] == pytest.approx(6)
    again.rolled_back(6, 2)
    assert again.account.seconds["rolled_back"] == pytest.approx(7.5 / 2)
