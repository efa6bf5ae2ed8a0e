"""A run of two processes on this machine: one is asked to stop, the launcher starts both again, and the run completes."""

import json
import os
import signal
import subprocess
import sys
import time

from fault_tools import TINY, losses, rows

SITE = """\
class = "mlt.launch.local.Local"
processes = 2

[environment]
JAX_DISABLE_MOST_OPTIMIZATIONS = "1"
JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS = "0"
"""
WORDS = ("--arg", "plain=true", "--arg", "steps=40", "--set", "mesh.fsdp=2", "--set", "train.peer_timeout_seconds=20")


def child_of(pid: int) -> int:
    """The newest process that `pid` started and that trains."""
    found = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True, check=True)
    return max(int(line.split()[0]) for line in found.stdout.splitlines() if "mlt.cli train" in line)


def test_two_processes_restart_together(tmp_path):
    site, run_dir = tmp_path / "local.toml", tmp_path / "run"
    site.write_text(SITE)
    line = [sys.executable, "-m", "mlt.cli", "launch", TINY, "--on", site, "--run-dir", run_dir, *WORDS]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    launcher = subprocess.Popen(
        [str(word) for word in line], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        end = time.monotonic() + 240
        while not any("train/loss" in row and row["step"] >= 3 for row in rows(run_dir)):
            assert launcher.poll() is None, launcher.stdout.read()
            assert time.monotonic() < end
            time.sleep(0.02)
        os.kill(child_of(launcher.pid), signal.SIGTERM)
        output, _ = launcher.communicate(timeout=240)
    finally:
        launcher.terminate()
        launcher.wait(timeout=60)
    assert launcher.returncode == 0, output
    assert "mlt launch: was asked to stop and saved its state: restart 1" in output
    assert "resuming after step" in output
    assert losses(run_dir).keys() == set(range(1, 41))
    starts = [row["num_processes"] for row in map(json.loads, (run_dir / "metrics.jsonl").open()) if row.get("kind") == "start"]
    assert starts == [2, 2]
    logs = run_dir / "logs" / "launch"
    assert "SIGTERM: saved step" in (logs / "process-0.log").read_text()
    assert "SIGTERM: saved step" in (logs / "process-1.log").read_text()
    # A step of several processes on CPUs is not kept compiled: see train/distributed.py.
    assert not list((logs / "compiled").glob("jit_train_step-*-cache"))
