"""How the fault tests run the command: as a user would, in a process of its own."""

import json
import os
import pathlib
import subprocess
import sys
import time

TINY = pathlib.Path(__file__).parent / "tiny.py"


class Command:
    """Starts `mlt` with a compilation cache shared by the tests of one session."""

    def __init__(self, cache: pathlib.Path):
        self.environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        self.environment |= {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def start(self, *words: object, **variables: object) -> subprocess.Popen:
        """Start the command, with environment variables of its own besides."""
        line = [sys.executable, "-m", "mlt.cli", *map(str, words)]
        return self.start_python(line, variables)

    def start_python(self, line: list[str], variables: dict[str, object]) -> subprocess.Popen:
        environment = self.environment | {name: str(value) for name, value in variables.items()}
        return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def __call__(self, *words: object) -> tuple[int, str]:
        """(exit code, everything it printed)."""
        process = self.start(*words)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output


def rows(run_dir: pathlib.Path) -> list[dict]:
    """Complete rows of a run's metrics."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def losses(run_dir: pathlib.Path) -> dict[int, float]:
    """Training loss of each logged step; a step logged twice must have been logged alike."""
    found: dict[int, float] = {}
    for row in rows(run_dir):
        if "train/loss" in row:
            assert found.setdefault(row["step"], row["train/loss"]) == row["train/loss"], row["step"]
    return found


def wait_for_step(run_dir: pathlib.Path, step: int, process: subprocess.Popen, timeout: float = 240) -> None:
    """Return once the run has logged `step`."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if any(row.get("step", 0) >= step and "train/loss" in row for row in rows(run_dir)):
            return
        if process.poll() is not None:
            raise AssertionError(f"the run ended early with {process.returncode}:\n{process.stdout.read()}")
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached in {timeout} s")
