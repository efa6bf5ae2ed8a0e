"""Which processes a run is made of, as flags, a launcher or a scheduler tell it. Touches no device and no network.

The first of these that says anything decides, and the ones after it fill in what it leaves open:

    --coordinator, --num-processes, --process-id        by hand
    MLT_COORDINATOR, MLT_NUM_PROCESSES, MLT_PROCESS_ID  by hand, or by a launcher
    SLURM_STEP_NUM_TASKS, SLURM_PROCID, ...             inside `srun`
    JOB_COMPLETION_INDEX                                the process id in an indexed Kubernetes Job or JobSet
"""

import dataclasses
import re
from collections.abc import Mapping

from mlt.errors import UserError

COORDINATOR, NUM_PROCESSES, PROCESS_ID, LOCAL_DEVICES = (
    "MLT_COORDINATOR",
    "MLT_NUM_PROCESSES",
    "MLT_PROCESS_ID",
    "MLT_LOCAL_DEVICES",
)
_FLAGS = {COORDINATOR: "--coordinator", NUM_PROCESSES: "--num-processes", PROCESS_ID: "--process-id"}
_SLURM_PORTS = (61440, 4096)  # first one and how many: what a job takes follows from its number


@dataclasses.dataclass(frozen=True)
class Processes:
    """One process's place among those of a run.

    Attributes:
        host: where process 0 can be reached.
        port: where process 0 listens.
        count: processes of the run, at least 2.
        index: of this process, in [0, count).
        local_devices: accelerators of this machine that are this process's; None takes all it can see.
    """

    host: str
    port: int
    count: int
    index: int
    local_devices: tuple[int, ...] | None = None

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def find_processes(
    environment: Mapping[str, str],
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Processes | None:
    """The processes of the run that is to start here; None where this process is the only one.

    Args:
        environment: variables, usually `os.environ`.
        coordinator: host:port of process 0.
        num_processes: how many there are.
        process_id: which of them this is.

    Raises:
        UserError: some of the three are given and others missing, or a value is none.
    """
    flags = {COORDINATOR: coordinator, NUM_PROCESSES: num_processes, PROCESS_ID: process_id}
    given = {name: (_FLAGS[name], str(value)) for name, value in flags.items() if value is not None}
    given = {name: (name, environment[name]) for name in _FLAGS if environment.get(name)} | given
    local = environment.get(LOCAL_DEVICES)
    if "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment:
        given = _from_slurm(environment) | given
        local = local or _slurm_devices(environment)
    elif given and "JOB_COMPLETION_INDEX" in environment:
        given = {PROCESS_ID: ("JOB_COMPLETION_INDEX", environment["JOB_COMPLETION_INDEX"])} | given
    if not given:
        return None
    missing = [name for name in _FLAGS if name not in given]
    if missing:
        there = " and ".join(f"{where}={value}" for where, value in given.values())
        lacking = " and ".join(f"{name} (or {_FLAGS[name]})" for name in missing)
        raise UserError(
            f"{there} is set, but {lacking} is not: a run of several processes needs all three on each of them. "
            "Set them, or unset them all to train in one process"
        )
    count, index = _number(*given[NUM_PROCESSES], least=1), _number(*given[PROCESS_ID], least=0)
    if index >= count:
        raise UserError(f"{given[PROCESS_ID][0]}={index}: with {given[NUM_PROCESSES][0]}={count} it must lie in 0 to {count - 1}")
    host, port = _address(*given[COORDINATOR])
    return None if count == 1 else Processes(host, port, count, index, _devices(local))


def _from_slurm(environment: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """The three values of a job step. A step of one task says nothing."""
    if environment["SLURM_STEP_NUM_TASKS"] == "1":
        return {}
    first, ports = _SLURM_PORTS
    job, step = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    host = first_host(environment.get("SLURM_STEP_NODELIST", "localhost"))
    return {
        COORDINATOR: ("SLURM_STEP_NODELIST", f"{host}:{first + (job + 7 * step) % ports}"),
        NUM_PROCESSES: ("SLURM_STEP_NUM_TASKS", environment["SLURM_STEP_NUM_TASKS"]),
        PROCESS_ID: ("SLURM_PROCID", environment["SLURM_PROCID"]),
    }


def first_host(nodes: str) -> str:
    """The first machine of a SLURM list: node07 of node[07-12,20],other3."""
    head, bracket, rest = nodes.partition("[")
    if not bracket or "," in head:
        return nodes.split(",")[0]
    numbers, _, tail = rest.partition("]")
    return head + re.split("[,-]", numbers)[0] + tail.split(",")[0]


def _slurm_devices(environment: Mapping[str, str]) -> str | None:
    """Tasks that share a machine and see all its accelerators take equal shares of them, in order."""
    visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    tasks = _tasks_here(environment)
    if tasks <= 1 or len(visible) < tasks or len(visible) % tasks:
        return None
    share, place = len(visible) // tasks, int(environment.get("SLURM_LOCALID", "0"))
    return ",".join(str(index) for index in range(place * share, (place + 1) * share))


def _tasks_here(environment: Mapping[str, str]) -> int:
    """Tasks of the step on this machine, from a list such as 8(x3),4 and the machine's place in it."""
    place, tasks = int(environment.get("SLURM_NODEID", "0")), 1
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        number, _, times = part.partition("(x")
        tasks, machines = int(number), int(times.rstrip(")") or 1)
        if place < machines:
            return tasks
        place -= machines
    return tasks


def _address(name: str, value: str) -> tuple[str, int]:
    host, _, port = value.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"{name}={value!r} is no address: give the host and a free port of process 0, such as node07:8476")
    return host.strip("[]"), int(port)


def _number(name: str, value: str, *, least: int) -> int:
    if not value.isdigit() or int(value) < least:
        raise UserError(f"{name}={value!r} is no whole number of at least {least}")
    return int(value)


def _devices(value: str | None) -> tuple[int, ...] | None:
    if not value:
        return None
    if not re.fullmatch(r"\d+(,\d+)*", value):
        raise UserError(f"{LOCAL_DEVICES}={value!r} is no list of device numbers; give them as 0,1")
    return tuple(int(number) for number in value.split(","))
