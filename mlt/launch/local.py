"""Several processes on this machine, watched and restarted by the command that launched them."""

import shlex
import socket
from collections.abc import Callable, Iterator
from typing import Literal

from mlt.config.problems import Problem
from mlt.errors import EXIT_PREEMPTED
from mlt.launch.files import write_files
from mlt.launch.restarts import combined, decide
from mlt.launch.snapshot import code_digest
from mlt.launch.spec import Job, RestartingSpec, at_least, python_path
from mlt.launch.supervise import Program, supervise

_ANY_PORT = "PORT"


class Local(RestartingSpec):
    """This machine.

    Attributes:
        processes: how many to start.
        devices_per_process: accelerators of each, taken in order; of the CPU, simulated devices.
        platform: what they compute on.
        grace_seconds: after one process failed, how long the others have to end by themselves before they are killed.
    """

    processes: int = 1
    devices_per_process: int = 1
    platform: Literal["cpu", "gpu"] = "cpu"
    grace_seconds: int = 60

    @property
    def num_devices(self) -> int:
        return self.processes * self.devices_per_process

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from at_least(self, 1, "processes", "devices_per_process", "grace_seconds")
        for name in ("JAX_NUM_CPU_DEVICES", "JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "MLT_LOCAL_DEVICES"):
            if name in self.environment:
                way = "use platform and devices_per_process"
                yield Problem(f"environment.{name}", self.environment[name], "is set by the launcher itself", way)

    def describe(self, job: Job) -> str:
        lines = [f"cd {shlex.quote(str(job.directory))}"]
        for program in self._programs(job, code_digest(), _ANY_PORT):
            words = [f"{name}={shlex.quote(value)}" for name, value in program.variables.items()]
            log = shlex.quote(str(program.log_path))
            lines.append(" \\\n  ".join([*words, f"{shlex.join(program.words)} >> {log} 2>&1 &"]))
        return "\n".join([*lines, "wait"]) + "\n"

    def submit(self, job: Job, say: Callable[[str], None]) -> int:
        digest = code_digest()
        write_files(job, digest)
        restarts = 0
        while True:
            ended = supervise(self._programs(job, digest, str(_free_port())), job.directory, self.grace_seconds, say)
            code = combined(ended.codes)
            if ended.asked is not None:
                # Who asked this command to stop asks for the whole run. Too early to save, a signal ends a process.
                return EXIT_PREEMPTED if -ended.asked in ended.codes else code
            decision = decide(job.run_dir, code, restarts=restarts, max_restarts=self.max_restarts, max_losses=self.max_losses)
            if code:
                say(f"mlt launch: {decision.text}")
            if not decision.again:
                return code
            restarts += 1

    def _programs(self, job: Job, digest: str, port: str) -> list[Program]:
        paths = job.paths
        words = (self.interpreter, "-P", "-m", "mlt.cli", "train", str(paths.config_path), "--run-dir", str(job.run_dir))
        common = self.variables(job) | {"PYTHONPATH": python_path(job, digest)}
        return [
            Program(words, common | self._variables_of(index, port), paths.process_log_path(index))
            for index in range(self.processes)
        ]

    def _variables_of(self, index: int, port: str) -> dict[str, str]:
        first = index * self.devices_per_process
        mine = ",".join(str(device) for device in range(first, first + self.devices_per_process))
        if self.platform == "cpu":
            found = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(self.devices_per_process)}
        else:
            found = {"CUDA_VISIBLE_DEVICES": mine} if self.processes == 1 else {"MLT_LOCAL_DEVICES": mine}
        if self.processes > 1:
            found |= {
                "MLT_COORDINATOR": f"127.0.0.1:{port}",
                "MLT_NUM_PROCESSES": str(self.processes),
                "MLT_PROCESS_ID": str(index),
            }
        return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
