"""The runs of a resume certificate: the command itself, in processes of its own, below one directory."""

import itertools
import os
import sys
from pathlib import Path

from mlt.config.dump import to_yaml
from mlt.config.run import RunConfig
from mlt.verify.resume_points import Watched


class Runs:
    """Starts runs of one config.

    Attributes:
        config: of all of them.
        place: the directory.
    """

    def __init__(self, config: RunConfig, place: Path) -> None:
        self.config, self.place = config, place
        self._config_path = place / "config.yaml"
        self._config_path.write_text(to_yaml(config))
        self._logs = itertools.count(1)
        self._children: list[Watched] = []

    def start(self, run: Path, *words: str, **variables: str) -> Watched:
        """Start or resume the run at a path, with more words on its command line and more variables around it."""
        line = [sys.executable, "-m", "mlt.verify.resume_child", str(self.notes(run))]
        line += ["train", str(self._config_path), "--run-dir", str(run), *words]
        self._log = self.place / f"log-{next(self._logs)}.txt"
        child = Watched(line, self._environment() | variables, run, self._log)
        self._children.append(child)
        return child

    def notes(self, run: Path) -> Path:
        """Where a run's processes note the batches that they read."""
        return self.place / f"{run.name}-batches"

    def last_words(self) -> str:
        """The end of what the run that was started last has printed."""
        return self._log.read_text(errors="replace")[-2000:]

    def stop(self) -> None:
        """Leave no child behind."""
        for child in self._children:
            child.kill()

    def _environment(self) -> dict[str, str]:
        """Of every child: this one's, a cache of compiled programs that they share, and as many CPU devices as are asked for."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MLT_") and name != "XLA_FLAGS"}
        flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in f]
        return kept | {
            "XLA_FLAGS": " ".join(flags),
            "JAX_NUM_CPU_DEVICES": str(self.config.mesh.num_devices),
            "JAX_COMPILATION_CACHE_DIR": str(self.place / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONUNBUFFERED": "1",
        }
