"""Runs of two processes over gloo, and of one process with as many devices."""

import pathlib
import socket
import subprocess
import sys

from fault_tools import TINY, Command
from fork_server import Child

WORDS = ("--arg", "plain=true", "--arg", "steps=40", "--set", "mesh.fsdp=2", "--set", "train.peer_timeout_seconds=20")
# Two processes compile the same program twice, and on CPU only the first finds it again: keep that short.
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": 1}
DEADLINE = 240.0


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def start_one(mlt: Command, run_dir: pathlib.Path, *, config: pathlib.Path = TINY, words: tuple[str, ...] = WORDS) -> Child:
    """One process with two devices."""
    words = ("train", config, "--run-dir", run_dir, *words)
    return mlt.fork(words, server="two devices", JAX_NUM_CPU_DEVICES=2, **QUICK)


def start_two(mlt: Command, run_dir: pathlib.Path, *, config: pathlib.Path = TINY, words: tuple[str, ...] = WORDS) -> list[Child]:
    """Two processes with a device each, told of each other by variables."""
    address, words = free_address(), ("train", config, "--run-dir", run_dir, *words)
    return [
        mlt.fork(words, of_two(index, address), server=f"process {index}", JAX_NUM_CPU_DEVICES=1, **QUICK) for index in (0, 1)
    ]


def of_two(index: int, address: str) -> dict[str, object]:
    return {"MLT_COORDINATOR": address, "MLT_NUM_PROCESSES": 2, "MLT_PROCESS_ID": index}


def endings(processes: list[Child] | list[subprocess.Popen], timeout: float = DEADLINE) -> list[tuple[int, str]]:
    """(exit code, output) of each; none outlives the test."""
    try:
        return [_ending(process, timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()


def _ending(process: Child | subprocess.Popen, timeout: float) -> tuple[int, str]:
    if isinstance(process, Child):
        return process.wait(timeout), process.output()
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def script(mlt: Command, path: pathlib.Path, variables: dict[str, object]) -> subprocess.Popen:
    return mlt.start_python([sys.executable, str(path)], variables)
