"""On a real SLURM: the quickstart over two tasks is stopped, requeues itself, and ends with an uninterrupted run's losses.

What the job script makes of each end is tried with tasks that only end: they cost nothing.
"""

import pathlib
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import slurm_tools
from fault_tools import losses, rows

from mlt.launch.slurm import Slurm
from mlt.launch.spec import Job

SITE = """\
class = "mlt.launch.slurm.Slurm"
nodes = 2
compilation_cache = "{cache}"

[environment]
JAX_NUM_CPU_DEVICES = "1"
JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS = "0"
JAX_DISABLE_MOST_OPTIMIZATIONS = "1"
"""
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
STEPS = 60
QUICKSTART = pathlib.Path(__file__).parents[2] / "configs" / "quickstart.py"
SETS = (
    *("mesh.fsdp=2", "train.peer_timeout_seconds=20", "data.source.max_bytes=200000", "log.every_steps=1", "sample.tokens=0"),
    # Each of these programs would be compiled four times more.
    *("checkpoint.every_steps=20", "data.validation_fraction=0"),
)
ARGS = ("width=32", f"steps={STEPS}", "sequence_length=64", "batch_size=2")
WORDS = (*(word for line in ARGS for word in ("--arg", line)), *(word for line in SETS for word in ("--set", line)))

MISSING = slurm_tools.missing()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=MISSING or "")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with slurm_tools.cluster(tmp_path_factory.mktemp("slurm")) as found:
        yield found


def submit(mlt, slurm, run_dir: pathlib.Path) -> str:
    """Launch the run in a directory; the job's number."""
    site = run_dir.with_name("slurm.toml")
    site.write_text(SITE.format(cache=mlt.environment["JAX_COMPILATION_CACHE_DIR"]))
    line = [sys.executable, "-m", "mlt.cli", "launch", QUICKSTART, "--on", site, "--run-dir", run_dir, *WORDS]
    environment = mlt.environment | {"SLURM_CONF": str(slurm.conf)}
    done = subprocess.run([str(word) for word in line], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return re.search(r"job (\d+):", done.stdout)[1]


def step_reached(slurm, run_dir, job, step, timeout=240):
    """Wait until the run has logged `step`."""
    end = time.monotonic() + timeout
    while not any(row.get("step", 0) >= step and "train/loss" in row for row in rows(run_dir)):
        assert slurm.state(job) not in FINAL, told(slurm, run_dir)
        assert time.monotonic() < end, told(slurm, run_dir)
        time.sleep(0.05)


def told(slurm, run_dir) -> str:
    logs = sorted((run_dir / "logs" / "launch").glob("*.log"))
    return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in logs) + slurm.logs()


def test_a_stopped_run_requeues_itself_and_ends_with_the_losses_of_an_uninterrupted_one(mlt, slurm, tmp_path):
    run_dir, whole_dir = tmp_path / "run", tmp_path / "whole"
    job = submit(mlt, slurm, run_dir)
    step_reached(slurm, run_dir, job, 5)
    slurm.run("scancel", "--signal=TERM", job)
    assert slurm.wait(job, *FINAL) == "COMPLETED", told(slurm, run_dir)

    logs = run_dir / "logs" / "launch"
    log = (logs / f"job-{job}.log").read_text()
    assert re.findall(r"restart (\d), ", log) == ["0", "1"], told(slurm, run_dir)
    assert "was asked to stop and saved its state: restart 1" in log
    assert re.findall(r"tasks ended with (\d+)", log) == ["75", "0"]
    assert (logs / f"{slurm_tools.HOST}-task-0.log").read_text().count("resuming after step") == 1, told(slurm, run_dir)
    assert [row["num_processes"] for row in rows(run_dir) if row.get("kind") == "start"] == [2, 2]

    process = mlt.start(
        "train", QUICKSTART, "--run-dir", whole_dir, *WORDS, JAX_NUM_CPU_DEVICES=2, JAX_DISABLE_MOST_OPTIMIZATIONS=1
    )
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    found, expected = losses(run_dir), losses(whole_dir)
    assert found.keys() == expected.keys() == set(range(1, STEPS + 1))
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)


TASK = """\
#!/bin/bash
# Stands for the interpreter: decides as it does, and in place of training ends as the file says, one word a start.
[[ "$*" == *mlt.launch.restarts* ]] && exec {python} "$@"
trap 'exit 75' TERM
word=$(sed -n "$((SLURM_RESTART_COUNT + 1))p" {ends})
[ "$word" = killed ] && [ "$SLURM_PROCID" = 1 ] && kill -KILL $$
[ "$word" = killed ] && word=70
while [ "$word" = waits ]; do sleep 0.1; done
exit "$word"
"""


@pytest.fixture
def ending(slurm, tmp_path, monkeypatch):
    """Submits a job whose tasks end with these words, start after start; (its number, its log)."""
    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))

    def submit(*words: object) -> tuple[str, pathlib.Path]:
        task, ends = tmp_path / "task", tmp_path / "ends"
        ends.write_text("".join(f"{word}\n" for word in words))
        task.write_text(TASK.format(python=sys.executable, ends=ends))
        task.chmod(0o755)
        said = []
        job = Job(pathlib.PurePosixPath(tmp_path / "run"), "{}", pathlib.PurePosixPath(tmp_path))
        assert Slurm(nodes=2, max_losses=2, python=str(task)).submit(job, said.append) == 0
        number = re.search(r"job (\d+):", said[0])[1]
        return number, job.paths.path / f"job-{number}.log"

    return submit


def test_lost_tasks_are_requeued_so_many_times(slurm, ending):
    job, log = ending(70, "killed", 70, 0)
    assert slurm.wait(job, *FINAL) == "FAILED", slurm.logs()
    text = log.read_text()
    assert re.findall(r"tasks ended with (\d+)", text) == ["70", "137", "70"], text
    assert "lost a process (code 137), the second time before the first checkpoint: restart 2" in text
    assert "lost a process 3 times in a row before the first checkpoint, and max_losses is 2" in text


def test_a_wrong_input_is_not_requeued(slurm, ending):
    job, log = ending(2, 0)
    assert slurm.wait(job, *FINAL) == "FAILED", slurm.logs()
    assert "its input is wrong; a restart would end the same way" in log.read_text()


def test_a_cancelled_job_saves_and_stays_cancelled(slurm, ending):
    job, log = ending("waits", 0)
    slurm.wait(job, "RUNNING")
    time.sleep(1)
    slurm.run("scancel", job)
    assert slurm.wait(job, *FINAL) == "CANCELLED", slurm.logs()
    time.sleep(1)
    assert slurm.state(job) == "CANCELLED"
    text = log.read_text()
    assert "the tasks ended with 75" in text
    assert "restart 1" not in text


def test_a_job_requeued_by_hand_saves_and_starts_once_more(slurm, ending):
    job, log = ending("waits", 0)
    slurm.wait(job, "RUNNING")
    time.sleep(1)
    slurm.run("scontrol", "requeue", job)
    assert slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED", slurm.logs()
    text = log.read_text()
    assert re.findall(r"restart (\d), ", text) == ["0", "1"], text
    assert re.findall(r"tasks ended with (\d+)", text) == ["75", "0"], text
