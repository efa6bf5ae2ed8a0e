"""How the fault tests run the command: in a process of its own, as a user would.

What a test waits for is a fork of a process that has imported everything (`fork_server`), and costs no imports; what it
watches, signals or kills is started by the plain command line.
"""

import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from fork_server import Child, ForkServer

TINY = pathlib.Path(__file__).parent / "tiny.py"


class Command:
    """Starts `mlt` with a compilation cache shared by the tests of one session."""

    def __init__(self, place: pathlib.Path):
        self._place, self._count = place, 0
        self._servers: dict[str, ForkServer] = {}
        self.environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        self.environment |= {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(place / "compiled"),
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
        child = self.fork(words)
        code = child.wait(timeout=300)
        return code, child.output()

    def fork(
        self, words: Sequence[object], variables: Mapping[str, object] | None = None, server: str = "", **of_server: object
    ) -> Child:
        """Run the command in a fork of a server: one child of a server at a time.

        Args:
          words: of the command line.
          variables: of the child's environment.
          server: a name; the server is started when it is first used.
          of_server: of the server's environment, for what JAX reads when it is imported.
        """
        if server not in self._servers:
            self._servers[server] = ForkServer(self.environment | {name: str(value) for name, value in of_server.items()})
        self._count += 1
        log = self._place / f"log-{self._count}.txt"
        own = {name: str(value) for name, value in (variables or {}).items()}
        return self._servers[server].start([str(word) for word in words], log, own)

    def close(self) -> None:
        """End the servers."""
        for server in self._servers.values():
            server.close()


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


def wait_for_step(run_dir: pathlib.Path, step: int, process: subprocess.Popen | Child, timeout: float = 240) -> None:
    """Return once the run has logged `step`."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if any(row.get("step", 0) >= step and "train/loss" in row for row in rows(run_dir)):
            return
        if process.poll() is not None:
            output = process.output() if isinstance(process, Child) else process.stdout.read()
            raise AssertionError(f"the run ended early with {process.poll()}:\n{output}")
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached in {timeout} s")
