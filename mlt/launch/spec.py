"""Where a run is to run: the base of every launcher's config, and the job that it is handed. Touches no device.

A launcher is one file with one subclass of `LaunchSpec`, and one TOML file per site that names it:

    class = "mlt.launch.slurm.Slurm"
    nodes = 4
"""

import abc
import dataclasses
import math
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from mlt.config.base import Config, FrozenMap
from mlt.config.build import build
from mlt.config.problems import ABSENT, ConfigError, Problem, check_tree
from mlt.errors import UserError
from mlt.launch.paths import LaunchPaths

_CPU_DEVICES = "JAX_NUM_CPU_DEVICES"
_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
# What a launcher sets itself; a site that set them too would pull the run apart.
_OURS = ("MLT_COORDINATOR", "MLT_NUM_PROCESSES", "MLT_PROCESS_ID", "JAX_COMPILATION_CACHE_DIR", "PYTHONPATH")


@dataclasses.dataclass(frozen=True)
class Job:
    """One run, resolved on the machine that launches it.

    Attributes:
        run_dir: directory of the run, as the processes of the run see it.
        config_text: the resolved config, as YAML: later changes of the config file change no restart.
        directory: working directory, which relative paths in the config start from.
    """

    run_dir: PurePosixPath
    config_text: str
    directory: PurePosixPath

    @property
    def name(self) -> str:
        """The run's name as schedulers take it: lower-case letters, digits and single dashes."""
        return re.sub(r"[^a-z0-9]+", "-", self.run_dir.name.lower()).strip("-") or "mlt"

    @property
    def paths(self) -> LaunchPaths:
        return LaunchPaths(self.run_dir)


class LaunchSpec(Config, abc.ABC):
    """A site: machines, processes on them, and their environment.

    Attributes:
        runs: directory that runs live in where no --run-dir is given.
        environment: variables of every process of the run.
        compilation_cache: directory of compiled programs, kept across restarts and shared by the runs that name it;
            None keeps it in the run's own logs.
    """

    runs: str = "runs"
    environment: Mapping[str, str] = FrozenMap({})
    compilation_cache: str | None = None

    @property
    @abc.abstractmethod
    def num_devices(self) -> int | None:
        """Devices of all processes together; None where only the machine knows."""

    @property
    def shares_files(self) -> bool:
        """Whether the machine that launches sees the files of the run and of its data."""
        return True

    @abc.abstractmethod
    def describe(self, job: Job) -> str:
        """The exact job, as text: what --dry-run prints. Writes nothing."""

    @abc.abstractmethod
    def submit(self, job: Job, say: Callable[[str], None]) -> int:
        """Start the job; the exit code of the command.

        Raises:
            UserError: the scheduler's command is missing or refuses, or a file cannot be written.
        """

    def run_dir(self, name: str) -> PurePosixPath:
        """The run directory of a run without one."""
        return PurePosixPath(Path(self.runs, name).absolute())

    def variables(self, job: Job) -> dict[str, str]:
        """Environment variables of every process of the job."""
        cache = self.compilation_cache or str(job.paths.compiled_path)
        return {"JAX_COMPILATION_CACHE_DIR": cache, **self.environment}

    def cpu_devices(self) -> int:
        """Devices of a process without accelerators, as the environment says."""
        value = self.environment.get(_CPU_DEVICES, "1")
        return int(value) if value.isdigit() else 1

    def problems(self) -> Iterator[Problem]:
        for name, value in self.environment.items():
            if not re.fullmatch(_NAME, name):
                yield Problem(f"environment.{name}", value, "is no name of an environment variable")
            elif name in _OURS:
                way = "use compilation_cache" if name == "JAX_COMPILATION_CACHE_DIR" else "leave it out"
                yield Problem(f"environment.{name}", value, "is set by the launcher itself", way)


class RestartingSpec(LaunchSpec, abc.ABC):
    """A site whose restarts `mlt.launch.restarts` decides on.

    Attributes:
        max_restarts: restarts of one launch, for whatever reason.
        max_losses: restarts in a row after a lost process, with no newer checkpoint between them.
        python: interpreter of the run; None takes the one that launches.
    """

    max_restarts: int = 100
    max_losses: int = 3
    python: str | None = None

    @property
    def interpreter(self) -> str:
        return self.python or sys.executable

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from at_least(self, 0, "max_restarts", "max_losses")


def at_least(node: Config, least: int, *names: str) -> Iterator[Problem]:
    """Problems of the fields below a limit; None passes."""
    for name in names:
        value = getattr(node, name)
        if value is not None and value < least:
            yield Problem(name, value, f"must be at least {least}")


def python_path(job: Job, digest: str) -> str:
    """Where Python finds the copy of the code first, and then what it finds here."""
    here = os.environ.get("PYTHONPATH")
    return f"{job.paths.code_path(digest)}{os.pathsep}{here}" if here else str(job.paths.code_path(digest))


def load_site(path: Path) -> LaunchSpec:
    """The launcher that a TOML file describes.

    Raises:
        UserError: the file cannot be read or is no TOML.
        ConfigError: every unknown key, wrong type and broken rule of it.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"{path} cannot be read: {reason}; --on takes a site file such as launch/slurm.toml") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: no valid TOML: {error}; correct it (launch/slurm.toml is an example)") from None
    if "class" not in data:
        ways = 'write class = "mlt.launch.local.Local", "mlt.launch.slurm.Slurm" or "mlt.launch.kubernetes.Kubernetes"'
        raise ConfigError([Problem("class", ABSENT, "must name the launcher", ways)], str(path))
    spec = build(data, LaunchSpec, str(path))
    check_tree(spec, str(path))
    assert isinstance(spec, LaunchSpec)
    return spec


def check_devices(spec: LaunchSpec, shape: Mapping[str, int], site: Path) -> None:
    """Refuse a mesh that does not use all devices of the site.

    Raises:
        UserError: the product of the degrees is another number.
    """
    wanted, there = math.prod(shape.values()), spec.num_devices
    if there is not None and wanted != there:
        degrees = " * ".join(f"{axis}={n}" for axis, n in shape.items() if n > 1) or "every axis 1"
        raise UserError(
            f"{site} gives {there} device{'' if there == 1 else 's'}, but mesh: {degrees} makes {wanted}; the product must "
            f"equal {there}, for instance --set mesh.fsdp={there}, or change the site"
        )
