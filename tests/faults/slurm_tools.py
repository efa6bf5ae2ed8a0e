"""A SLURM cluster of two nodes on loopback, in a directory of its own and with daemons of its own."""

import contextlib
import os
import pathlib
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
HOST = socket.gethostname().partition(".")[0]
# Process 0 runs on the first one, so that its name has to be one that is found; SLURM takes "localhost" for no name.
NODES = (HOST, f"{HOST}-second")

_CONF = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={place}/munge.socket,cred_expire=5
SlurmctldPort={ports[0]}
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd-%n.pid
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool-%n
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd-%n.log
ProctrackType=proctrack/pgid
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=1,sched_interval=1,bf_interval=1
ReturnToService=2
KillWait=60
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName={host}-second NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=all Nodes={host},{host}-second Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why no cluster can be started here, if so."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if absent:
        return f"no SLURM here ({', '.join(absent)} missing): on Debian, apt-get install slurm-wlm munge"
    if os.geteuid():
        return "starting SLURM's daemons takes root"
    try:
        socket.getaddrinfo(HOST, None)
    except OSError:
        return f"this machine's own name, {HOST}, is not found: add it to /etc/hosts"
    return None


class Cluster:
    """Commands of a running cluster."""

    def __init__(self, place: pathlib.Path) -> None:
        self.place = place
        self.conf = place / "slurm.conf"

    def run(self, *words: object) -> str:
        """What a command of SLURM prints."""
        done = subprocess.run(
            [str(word) for word in words],
            env={**os.environ, "SLURM_CONF": str(self.conf)},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, (words, done.stdout, done.stderr, self.logs())
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """Of a job, such as RUNNING or COMPLETED."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return next(word.removeprefix("JobState=") for word in words if word.startswith("JobState="))

    def wait(self, job: str, *states: str, timeout: float = 240.0) -> str:
        """The first of these states that a job is found in."""
        end = time.monotonic() + timeout
        while (state := self.state(job)) not in states:
            assert time.monotonic() < end, (job, state, self.logs())
            time.sleep(0.2)
        return state

    def logs(self) -> str:
        return "\n".join(f"== {path.name}\n{path.read_text()[-2000:]}" for path in sorted(self.place.glob("*.log")))


@contextlib.contextmanager
def cluster(place: pathlib.Path) -> Iterator[Cluster]:
    """Start munged, slurmctld and two slurmd; end them, and nothing else, in the end."""
    found = Cluster(place)
    place.chmod(0o755)
    keys = place / "munge"
    keys.mkdir(mode=0o700)
    (keys / "key").write_bytes(os.urandom(1024))
    (keys / "key").chmod(0o400)
    (place / "state").mkdir()
    found.conf.write_text(_CONF.format(host=HOST, place=place, ports=_free_ports(3)))
    if _version() >= 23:  # the first that can do without cgroups, and wants to be told
        (place / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
    munge = [f"--{name}={path}" for name, path in (("key-file", keys / "key"), ("socket", place / "munge.socket"))]
    munge += [f"--pid-file={keys}/pid", f"--log-file={keys}/log", f"--seed-file={keys}/seed"]
    daemons: list[subprocess.Popen] = []
    try:
        daemons.append(_start(place, "munged", "--foreground", "--force", *munge))
        _until((place / "munge.socket").exists, "munged did not start", found)
        daemons.append(_start(place, "slurmctld", "-D", "-f", found.conf))
        daemons += [_start(place, "slurmd", "-D", "-N", node, "-f", found.conf) for node in NODES]
        _until(lambda: _idle_nodes(found) == len(NODES), "the nodes did not come up", found)
        yield found
        found.run("scancel", "--user=root")
        _until(lambda: not found.run("squeue", "--noheader"), "a job did not end", found, timeout=90)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _version() -> int:
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"
    said = subprocess.run([shutil.which("slurmd", path=path), "-V"], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"(\d+)\.", said)[1])


def _start(place: pathlib.Path, program: str, *words: object) -> subprocess.Popen:
    environment = os.environ | {"PATH": f"{os.environ.get('PATH', '')}:/usr/sbin", "SLURM_CONF": str(place / "slurm.conf")}
    with (place / f"{program}.out.log").open("ab") as log:
        return subprocess.Popen(
            [shutil.which(program, path=environment["PATH"]), *map(str, words)], env=environment, stdout=log, stderr=log
        )


def _idle_nodes(found: Cluster) -> int:
    done = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--format=%t"],
        env={**os.environ, "SLURM_CONF": str(found.conf)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.split().count("idle")


def _until(holds, words: str, found: Cluster, timeout: float = 40.0) -> None:
    end = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < end, f"{words}\n{found.logs()}"
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
