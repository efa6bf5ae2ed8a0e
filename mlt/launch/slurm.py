"""A SLURM job: one script, submitted once, that requeues itself and runs the same code every time."""

import re
import shlex
import subprocess
from collections.abc import Callable, Iterator

from mlt.config.problems import Problem
from mlt.errors import UserError
from mlt.launch.files import write_files
from mlt.launch.snapshot import code_digest
from mlt.launch.spec import Job, RestartingSpec, at_least, python_path

_TIME = r"(\d+-)?\d+(:\d\d){0,2}"
# Options with a field of their own, or that the script depends on.
_OURS = frozenset(
    (
        *("--nodes", "--ntasks-per-node", "--ntasks", "--gpus-per-node", "--gpus", "--cpus-per-task", "--partition"),
        *("--account", "--qos", "--time", "--job-name", "--requeue", "--no-requeue", "--open-mode", "--signal", "--output"),
        *("--error", "--chdir", "-N", "-n", "-c", "-p", "-A", "-q", "-t", "-J", "-o", "-e", "-D", "-G"),
    )
)

_SCRIPT = """\
#!/bin/bash
{options}

{prelude}
unset MLT_COORDINATOR MLT_NUM_PROCESSES MLT_PROCESS_ID MLT_LOCAL_DEVICES

# SLURM signals this shell, too, when it cancels or requeues the job: it has to wait for the tasks to save.
trap : TERM
echo "mlt: job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restart ${{SLURM_RESTART_COUNT:-0}}, $(date '+%F %T')"
srun {srun} \\
    {train}
code=$?
echo "mlt: the tasks ended with $code, $(date '+%F %T')"
# A job that SLURM is ending by itself (cancelled, preempted, requeued by hand) is not RUNNING any more: leave it alone.
if [ "$code" -ne 0 ] && [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ] && \\
    {decide}; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


class Slurm(RestartingSpec):
    """A SLURM cluster whose machines share a file system. The processes find each other by SLURM's own variables.

    Attributes:
        nodes: machines.
        tasks_per_node: processes on each; several share its GPUs equally.
        gpus_per_node: GPUs of each; 0 asks for none and computes on the CPU.
        gpu_type: name of their kind in the cluster, such as h100; None takes any.
        cpus_per_task: cores of each process; None leaves it to the cluster.
        partition: where to queue; None takes the cluster's default, as with the next two.
        account: whom to charge.
        qos: quality of service.
        time: limit of one stretch, such as 1-00:00:00; None takes the partition's. A run may take many.
        grace_seconds: how long before the limit the processes are asked to save.
        options: further lines for sbatch, such as "--exclusive".
        setup: shell lines to run on the first machine before the start, such as "module load cuda".
    """

    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int = 0
    gpu_type: str | None = None
    cpus_per_task: int | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    grace_seconds: int = 300
    options: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()

    @property
    def num_devices(self) -> int:
        return self.nodes * (self.gpus_per_node or self.tasks_per_node * self.cpu_devices())

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from at_least(self, 1, "nodes", "tasks_per_node", "cpus_per_task", "grace_seconds")
        yield from at_least(self, 0, "gpus_per_node")
        if self.tasks_per_node > 0 and self.gpus_per_node > 0 and self.gpus_per_node % self.tasks_per_node:
            ways = "use 1 for one process a machine"
            yield Problem("tasks_per_node", self.tasks_per_node, f"must divide gpus_per_node = {self.gpus_per_node}", ways)
        if self.time is not None and not re.fullmatch(_TIME, self.time):
            yield Problem("time", self.time, "is no time limit of SLURM", "write minutes, hours:minutes:seconds or days-hours")
        for index, option in enumerate(self.options):
            name = re.split("[= ]", option, maxsplit=1)[0]
            if not option.startswith("-") or "\n" in option:
                yield Problem(f"options[{index}]", option, "must be one option of sbatch", 'such as "--exclusive"')
            elif name in _OURS or (name == "--gres" and "gpu" in option):
                yield Problem(f"options[{index}]", option, "is set by the launcher", "use a field such as nodes or gpus_per_node")

    def describe(self, job: Job) -> str:
        return self._script(job, code_digest())

    def submit(self, job: Job, say: Callable[[str], None]) -> int:
        digest = code_digest()
        write_files(job, digest, self._script(job, digest))
        script = job.paths.script_path
        try:
            done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise UserError(f"there is no sbatch here; submit {script} on a machine that has it, with: sbatch {script}") from None
        if done.returncode:
            raise UserError(
                f"sbatch refuses {script}: {done.stderr.strip()}\ncorrect the site file (partition, account, time limit); where "
                f"SLURM cannot be reached from here, submit it on a machine of the cluster: sbatch {script}"
            )
        number = done.stdout.strip().partition(";")[0]
        say(
            f"job {number}: {job.paths.path}/job-{number}.log\n"
            f"  tail -F {job.paths.path}/*.log          follow\n"
            f"  scancel --signal=TERM {number}    save, and wait in the queue again\n"
            f"  scancel {number}                  save, and end"
        )
        return 0

    def _script(self, job: Job, digest: str) -> str:
        paths = job.paths
        python = [self.interpreter, "-P", "-m"]
        flags = ["--kill-on-bad-exit=0", "--wait=0", "--open-mode=append", f"--output={paths.path}/%N-task-%t.log"]
        if self.cpus_per_task is not None:
            flags.append(f"--cpus-per-task={self.cpus_per_task}")  # srun does not inherit it
        limits = [f"--max-restarts={self.max_restarts}", f"--max-losses={self.max_losses}"]
        decide = [*python, "mlt.launch.restarts", str(job.run_dir), *limits]
        return _SCRIPT.format(
            options="\n".join(f"#SBATCH {option}" for option in self._options(job)),
            prelude="\n".join([*self.setup, *self._exports(job, digest)]),
            srun=" ".join(map(shlex.quote, flags)),
            train=shlex.join([*python, "mlt.cli", "train", str(paths.config_path), "--run-dir", str(job.run_dir)]),
            decide=shlex.join(decide) + ' --code="$code" --restarts="${SLURM_RESTART_COUNT:-0}"',
        )

    def _options(self, job: Job) -> list[str]:
        gpus = f"{self.gpu_type}:{self.gpus_per_node}" if self.gpu_type else str(self.gpus_per_node)
        named = {
            "job-name": job.name,
            "nodes": self.nodes,
            "ntasks-per-node": self.tasks_per_node,
            "gpus-per-node": gpus if self.gpus_per_node else None,
            "cpus-per-task": self.cpus_per_task,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "time": self.time,
            # Without B: it goes to the tasks, not to the shell.
            "signal": f"TERM@{self.grace_seconds}",
            "chdir": shlex.quote(str(job.directory)),
            "output": shlex.quote(f"{job.paths.path}/job-%j.log"),
            "open-mode": "append",
        }
        return [*(f"--{name}={value}" for name, value in named.items() if value is not None), "--requeue", *self.options]

    def _exports(self, job: Job, digest: str) -> list[str]:
        variables = {"PYTHONPATH": python_path(job, digest)} | self.variables(job)
        if not self.gpus_per_node:
            variables |= {"JAX_PLATFORMS": "cpu"}
        return [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
