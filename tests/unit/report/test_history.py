"""What the metrics file tells, whatever state a crash left it in."""

import json
from pathlib import Path

import numpy as np
import pytest

from mlt.report.history import Series, families, read_history, smooth, thin, wait_share
from mlt.report.text import amount, byte_size, duration, number, power, printable


def write(path: Path, *rows: dict, tail: str = "") -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return path


def test_rows_become_series_and_time_is_counted_per_start(tmp_path):
    path = write(
        tmp_path / "metrics.jsonl",
        {"kind": "start", "step": 0, "time": 100.0, "steps": 30, "device": "old"},
        {"step": 10, "time": 104.0, "train/loss": 3.0},
        {"step": 10, "time": 105.0, "eval/loss": 3.5},
        {"kind": "start", "step": 10, "time": 1000.0, "steps": 40},
        {"step": 20, "time": 1007.0, "train/loss": None, "nonfinite": {"train/loss": "nan"}, "note": "text"},
        tail='[1]\nnot json\n{"no": "step"}\n{"step": 30, "train/lo',
    )
    history = read_history(path)
    assert history.seconds == 5.0 + 7.0
    assert history.last_step() == 20
    assert (history.fact("steps"), history.fact("device"), history.fact("none")) == (40, "old", None)
    assert sorted(history.series) == ["eval/loss", "train/loss"]
    loss = history.get("train/loss")
    assert loss.steps.tolist() == [10, 20]
    assert loss.values[0] == 3.0
    assert np.isnan(loss.values[1])
    assert loss.finite().last() == 3.0
    assert history.get("absent").last() is None


def test_no_file_is_an_empty_history(tmp_path):
    history = read_history(tmp_path / "metrics.jsonl")
    assert (history.last_step(), history.seconds, history.starts, history.series) == (0, 0.0, [], {})


def test_wait_share_counts_the_steps_between_rows(tmp_path):
    def row(step: int, wait: float, pace: float) -> dict:
        return {"step": step, "time": float(step), "data/wait_seconds": wait, "throughput/step_seconds": pace}

    path = write(
        tmp_path / "metrics.jsonl",
        {"kind": "start", "step": 0, "time": 0.0},
        row(1, 1.0, 2.0),  # half of one step of 2 s
        row(11, 1.0, 0.5),  # a fifth of ten steps of 0.5 s
        {"kind": "start", "step": 15, "time": 12.0},
        row(20, 1.0, 2.0),  # a tenth of the five steps since the resume
    )
    share = wait_share(read_history(path))
    assert share.steps.tolist() == [1, 11, 20]
    assert share.values == pytest.approx([50.0, 20.0, 10.0])


@pytest.mark.parametrize("count", [5, 1000, 1001, 2500, 123_457])
def test_thinning_keeps_both_ends_and_every_spike(count):
    values = np.sin(np.arange(count) / 7)
    values[[count // 3, 2 * count // 3]] = 50, -50
    series = thin(Series(np.arange(count) * 10.0, values), 1000)
    assert len(series) <= 1000
    assert series.steps[[0, -1]].tolist() == [0, (count - 1) * 10]
    assert (series.values.max(), series.values.min()) == (50, -50)
    assert np.all(np.diff(series.steps) > 0)
    assert np.array_equal(series.values, values[(series.steps / 10).astype(int)])


def test_smoothing_neither_lags_nor_leads_and_averages_noise_away():
    steps = np.arange(1000.0)
    line = smooth(Series(steps, 3 - 0.002 * steps)).values
    assert np.allclose(line[:960], 3 - 0.002 * steps[:960], atol=1e-9)
    noise = np.random.default_rng(0).normal(size=1000)
    assert smooth(Series(steps, noise)).values[50:].std() < 0.25


def test_names_that_differ_in_numbers_are_one_family():
    names = ["moe/blocks.0/load", "moe/blocks.11/load", "moe/blocks.0/entropy", "engram/hits"]
    assert families(names) == {
        "moe/blocks.*/load": ["moe/blocks.0/load", "moe/blocks.11/load"],
        "moe/blocks.0/entropy": ["moe/blocks.0/entropy"],
        "engram/hits": ["engram/hits"],
    }


def test_numbers_read_well():
    assert [number(x) for x in (0, 2.34567, 0.0123, 31420.4, 1e-7, float("nan"))] == [
        *("0.000", "2.346", "0.01230", "31,420", "1.000e-07", "nan"),
    ]
    assert [amount(x) for x in (None, 0, 950, 12345, 4.56e6, 7.891e9, 2e12)] == [
        None,
        "0",
        "950",
        "12.3k",
        "4.56M",
        "7.89B",
        "2T",
    ]
    assert [byte_size(x) for x in (512, 1536, 61.3e9)] == ["512 B", "1.5 KiB", "57.1 GiB"]
    assert [duration(x) for x in (4.24, 46, 200, 18720, 273600)] == ["4.2 s", "46 s", "3m 20s", "5h 12m", "3d 4h"]
    assert [power(x) for x in (0, 3e-4, 2.5e-5)] == ["0", "3e-4", "2.5e-5"]
    assert printable("a\x00\x1b\n\té") == "a\ufffd\ufffd\n\té"
