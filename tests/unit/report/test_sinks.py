"""Sinks: rows that survive crashes and resumes, and never stop a training."""

import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlt.config.problems import ConfigError, check_tree
from mlt.report.sinks import JsonLinesSink, LogConfig, MetricSinks, open_sinks, truncate_rows
from mlt.report.wandb_sink import WandbConfig
from mlt.run_paths import RunPaths


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")) for line in path.open()]


def steps(path: Path) -> list[int]:
    return [row["step"] for row in rows(path)]


def test_rows_are_on_the_disk_at_once_and_exact(tmp_path):
    sinks = open_sinks(LogConfig(), RunPaths(tmp_path), 0)
    sinks.start({"jax": "1.2", "num_devices": 8})
    sinks.log(10, {"train/loss": 0.1 + 0.2, "train/tokens": 2**60, "x": np.float32(1.5)})
    start, row = rows(tmp_path / "metrics.jsonl")
    assert start.pop("time") <= row.pop("time")
    assert start == {"kind": "start", "step": 0, "jax": "1.2", "num_devices": 8}
    assert row == {"step": 10, "train/loss": 0.1 + 0.2, "train/tokens": 2**60, "x": 1.5}
    sinks.close()


def test_values_that_are_not_finite_are_null_and_named(tmp_path):
    sink = JsonLinesSink(tmp_path / "m.jsonl")
    sink.log(1, {"a": math.nan, "b": -math.inf, "c": 1.0})
    (row,) = rows(tmp_path / "m.jsonl")
    assert (row["a"], row["b"], row["c"]) == (None, None, 1.0)
    assert row["nonfinite"] == {"a": "nan", "b": "-inf"}
    sink.close()


@pytest.mark.parametrize("tail", ["", '{"step": 31, "train/lo', "\x00\x00\x00", '{"step": 25}\n{"st'])
def test_a_resume_drops_what_came_after_the_checkpoint(tmp_path, tail):
    paths = RunPaths(tmp_path)
    with open_sinks(LogConfig(), paths, 0) as sinks:
        sinks.start({})
        for step in (10, 20, 30):
            sinks.log(step, {"x": step})
    with paths.metrics_path.open("a") as file:
        file.write(tail)
    paths.samples_path.write_text('{"step": 20, "text": "a"}\n{"step": 30, "text": "b"}\n')
    with open_sinks(LogConfig(), paths, 20) as sinks:
        sinks.start({})
        sinks.log(30, {"x": 31})
    assert steps(paths.metrics_path) == [0, 10, 20, 20, 30]
    assert rows(paths.metrics_path)[-1]["x"] == 31
    assert steps(paths.samples_path) == [20]
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "samples.jsonl"]


def test_nothing_to_drop_leaves_the_file_alone(tmp_path):
    path = tmp_path / "m.jsonl"
    truncate_rows(path, 5)
    assert not path.exists()
    path.write_text('{"step": 5}\n')
    before = path.stat()
    truncate_rows(path, 5)
    assert path.stat().st_ino == before.st_ino
    truncate_rows(path, 4)
    assert path.read_text() == ""


def test_a_torn_line_does_not_swallow_the_next(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "x"')
    sink = JsonLinesSink(path)
    sink.log(3, {})
    sink.log(4, {})
    sink.close()
    lines = path.read_text().split("\n")
    assert [json.loads(line)["step"] for line in (lines[0], *lines[2:4])] == [1, 3, 4]


class Recorder:
    def __init__(self) -> None:
        self.steps: list[int] = []

    def start(self, step: int, facts: Mapping[str, Any]) -> None:
        self.steps.append(step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.steps.append(step)

    def close(self) -> None:
        self.steps.append(-1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_reported_once_and_stops_nothing(caplog):
    other = Recorder()
    with caplog.at_level(logging.WARNING, "mlt.report"), MetricSinks([JsonLinesSink(Path("/dev/full")), other], 3) as sinks:
        sinks.start({})
        for step in (4, 5, 6):
            sinks.log(step, {"x": 1.0})
    assert other.steps == [3, 4, 5, 6, -1]
    (record,) = caplog.records
    assert "JsonLinesSink" in record.getMessage()
    assert "No space left" in record.getMessage()


def test_rows_missed_on_a_full_disk_leave_a_readable_file(tmp_path):
    code = """
import resource, sys
from pathlib import Path
from mlt.report.sinks import JsonLinesSink, MetricSinks
sinks = MetricSinks([JsonLinesSink(Path(sys.argv[1]))])
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
sinks.log(1, {"x": 1.0})
resource.setrlimit(resource.RLIMIT_FSIZE, (80, hard))
sinks.log(2, {"x": 2.0})
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
sinks.log(3, {"x": 3.0})
sinks.close()
assert "wandb" not in sys.modules, "wandb is imported without being asked for"
"""
    path = tmp_path / "m.jsonl"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "File too large" in done.stderr
    truncate_rows(path, 10)
    assert steps(path) == [1, 2, 3]


def test_wandb_goes_on_with_the_same_run_offline(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    paths = RunPaths(tmp_path)
    paths.config_path.write_text("train: {steps: 30}\n")
    config = LogConfig(wandb=WandbConfig(project="mlt"))
    for first in (0, 10):
        with open_sinks(config, paths, first) as sinks:
            sinks.start({"jax": "1.2"})
            sinks.log(first + 10, {"train/loss": 1.0})
    name = (tmp_path / "wandb" / "run_id").read_text()
    deadline = time.monotonic() + 20  # wandb writes on in its own process
    while True:
        written = [path.read_bytes() for path in (tmp_path / "wandb").glob(f"offline-run-*-{name}*/run-{name}.wandb")]
        if len(written) == 2 and all(b"train/loss" in content for content in written):
            break
        assert time.monotonic() < deadline, f"{len(written)} runs, not two with their rows"
        time.sleep(0.05)
    assert steps(paths.metrics_path) == [0, 10, 10, 20]


def test_a_wandb_that_fails_is_reported_and_left_out(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_MODE", "no such mode")
    with caplog.at_level(logging.WARNING, "mlt.report"):
        sinks = open_sinks(LogConfig(wandb=WandbConfig(project="mlt")), RunPaths(tmp_path), 0)
    sinks.log(1, {"x": 1.0})
    sinks.close()
    assert "wandb is not used" in caplog.text
    assert steps(tmp_path / "metrics.jsonl") == [1]


def test_the_log_interval_is_checked():
    with pytest.raises(ConfigError, match="every_steps"):
        check_tree(LogConfig(every_steps=0))
