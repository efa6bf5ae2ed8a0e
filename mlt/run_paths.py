"""The files of a run directory, and how to write one whole."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO


class RunPaths:
    """Where a run keeps what. Creates nothing.

    config.yaml     the resolved config             metrics.jsonl   one row of metrics a line
    plan.txt        the printed plan                samples.jsonl   texts drawn on the way
    checkpoints/    <step>/{state,data,meta}        report.html     the page made of all of these
    logs/           of processes and launchers      run.lock        held by the process that trains here
    profile/        traces of steps, by process
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_path = self.path / "config.yaml"
        self.plan_path = self.path / "plan.txt"
        self.metrics_path = self.path / "metrics.jsonl"
        self.samples_path = self.path / "samples.jsonl"
        self.checkpoints_path = self.path / "checkpoints"
        self.report_path = self.path / "report.html"
        self.logs_path = self.path / "logs"
        self.clusters_path = self.path / "clusters.npz"
        self.collisions_path = self.logs_path / "collisions.json"
        self.lock_path = self.path / "run.lock"

    def process_log_path(self, index: int) -> Path:
        """What process `index` of several has to say; process 0 says it on the terminal."""
        return self.logs_path / f"process-{index}.log"

    def stacks_path(self, index: int) -> Path:
        """Where process `index` writes the stacks of its threads when it hangs."""
        return self.logs_path / f"stacks-{index}.txt"

    def profile_path(self, index: int) -> Path:
        """Where process `index` writes the steps that it traces."""
        return self.path / "profile" / str(index)

    def in_use(self) -> bool:
        """Tell whether a process trains here now, as far as the file system knows."""
        try:
            with self.lock_path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that takes the place of `path` when the block ends well; a crash leaves the old one or the new one.

    Raises:
      OSError: it cannot be written; `path` is untouched then.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all, see `replacing`."""
    with replacing(path) as file:
        file.write(text.encode())
