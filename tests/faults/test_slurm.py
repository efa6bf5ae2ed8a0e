"""On a real SLURM: a run over two tasks is requeued, cancelled and resumed to the losses of an uninterrupted one."""

import re
import subprocess
import sys
import time

import numpy as np
import pytest
import slurm_tools
from fault_tools import TINY, losses, rows

SITE = """\
class = "mlt.launch.slurm.Slurm"
nodes = 2
compilation_cache = "{cache}"

[environment]
JAX_NUM_CPU_DEVICES = "1"
JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS = "0"
JAX_DISABLE_MOST_OPTIMIZATIONS = "1"
"""
STEPS = 200
WORDS = ("--arg", "plain=true", "--arg", f"steps={STEPS}", "--set", "mesh.fsdp=2", "--set", "train.peer_timeout_seconds=20")

pytestmark = pytest.mark.skipif(slurm_tools.missing() is not None, reason=str(slurm_tools.missing()))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with slurm_tools.cluster(tmp_path_factory.mktemp("slurm")) as found:
        yield found


@pytest.fixture(scope="module")
def launch(mlt, slurm, tmp_path_factory):
    """Submits the run in a directory; returns the job's number."""
    site = tmp_path_factory.mktemp("site") / "slurm.toml"
    site.write_text(SITE.format(cache=mlt.environment["JAX_COMPILATION_CACHE_DIR"]))

    def submit(run_dir) -> str:
        line = [sys.executable, "-m", "mlt.cli", "launch", TINY, "--on", site, "--run-dir", run_dir, *WORDS]
        environment = mlt.environment | {"SLURM_CONF": str(slurm.conf)}
        done = subprocess.run([str(word) for word in line], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return re.search(r"job (\d+):", done.stdout)[1]

    return submit


def step_reached(slurm, run_dir, job, step, timeout=240):
    """Wait until the run has logged `step`."""
    end = time.monotonic() + timeout
    while not any(row.get("step", 0) >= step and "train/loss" in row for row in rows(run_dir)):
        assert slurm.state(job) in ("PENDING", "RUNNING", "CONFIGURING"), told(slurm, run_dir)
        assert time.monotonic() < end, told(slurm, run_dir)
        time.sleep(0.05)


def told(slurm, run_dir) -> str:
    logs = sorted((run_dir / "logs" / "launch").glob("*.log"))
    return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in logs) + slurm.logs()


def newest_step(run_dir) -> int:
    return max(row["step"] for row in rows(run_dir) if "train/loss" in row)


@pytest.fixture(scope="module")
def story(slurm, launch, tmp_path_factory):
    """What happens to one run: asked to save, requeued by hand, a task killed, cancelled, launched again, finished."""
    run_dir = tmp_path_factory.mktemp("story") / "run"
    job = launch(run_dir)
    step_reached(slurm, run_dir, job, 5)
    slurm.run("scancel", "--signal=TERM", job)
    step_reached(slurm, run_dir, job, newest_step(run_dir) + 20)
    slurm.run("scontrol", "requeue", job)
    step_reached(slurm, run_dir, job, newest_step(run_dir) + 20)
    slurm.run("scancel", "--signal=KILL", f"{job}.0")
    step_reached(slurm, run_dir, job, newest_step(run_dir) + 20)
    slurm.run("scancel", job)
    cancelled = slurm.wait(job, "CANCELLED")
    time.sleep(2)
    still = slurm.state(job)
    again = launch(run_dir)
    ended = slurm.wait(again, "COMPLETED", "FAILED", "CANCELLED")
    return {"run_dir": run_dir, "job": job, "again": again, "cancelled": (cancelled, still), "ended": ended}


def test_the_run_comes_to_its_end(slurm, story):
    assert story["ended"] == "COMPLETED", told(slurm, story["run_dir"])


def test_a_cancelled_job_stays_cancelled(story):
    assert story["cancelled"] == ("CANCELLED", "CANCELLED")


def test_the_job_requeues_itself_and_says_why(slurm, story):
    log = (story["run_dir"] / "logs" / "launch" / f"job-{story['job']}.log").read_text()
    assert re.findall(r"restart (\d), ", log) == ["0", "1", "2", "3"], told(slurm, story["run_dir"])
    assert "was asked to stop and saved its state: restart 1" in log
    assert "lost a process (code 137), the first time" in log
    assert log.count("mlt: the tasks ended with 75") == 3


def test_every_restart_resumes(slurm, story):
    log = (story["run_dir"] / "logs" / "launch" / f"{slurm_tools.HOST}-task-0.log").read_text()
    assert log.count("resuming after step") == 4, told(slurm, story["run_dir"])


def test_the_losses_are_those_of_an_uninterrupted_run(mlt, story, tmp_path):
    run_dir = tmp_path / "run"
    process = mlt.start("train", TINY, "--run-dir", run_dir, *WORDS, JAX_NUM_CPU_DEVICES=2, JAX_DISABLE_MOST_OPTIMIZATIONS=1)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    found, expected = losses(story["run_dir"]), losses(run_dir)
    assert found.keys() == expected.keys() == set(range(1, STEPS + 1))
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)
