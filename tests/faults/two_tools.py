"""Runs of two processes over gloo, and of one process with as many devices."""

import pathlib
import signal
import socket
import subprocess
import sys

from fault_tools import TINY, Command, wait_for_step

WORDS = ("--arg", "plain=true", "--arg", "steps=40", "--set", "mesh.fsdp=2", "--set", "train.peer_timeout_seconds=20")
# Two processes compile the same program twice, and on CPU only the first finds it again: keep that short.
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": 1}
DEADLINE = 240.0


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def start_one(mlt: Command, run_dir: pathlib.Path, *words: object) -> subprocess.Popen:
    """One process with two devices."""
    return mlt.start("train", TINY, "--run-dir", run_dir, *WORDS, *words, JAX_NUM_CPU_DEVICES=2, **QUICK)


def start_two(mlt: Command, run_dir: pathlib.Path, *words: object) -> list[subprocess.Popen]:
    """Two processes with a device each, told of each other by variables."""
    address = free_address()
    return [mlt.start("train", TINY, "--run-dir", run_dir, *WORDS, *words, **of_two(index, address), **QUICK) for index in (0, 1)]


def of_two(index: int, address: str) -> dict[str, object]:
    return {"MLT_COORDINATOR": address, "MLT_NUM_PROCESSES": 2, "MLT_PROCESS_ID": index, "JAX_NUM_CPU_DEVICES": 1}


def endings(processes: list[subprocess.Popen], timeout: float = DEADLINE) -> list[tuple[int, str]]:
    """(exit code, output) of each; none outlives the test."""
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def signal_at(run_dir: pathlib.Path, step: int, process: subprocess.Popen, number: signal.Signals) -> None:
    """Send a signal once the run has logged a step."""
    wait_for_step(run_dir, step, process)
    process.send_signal(number)


def script(mlt: Command, path: pathlib.Path, variables: dict[str, object]) -> subprocess.Popen:
    return mlt.start_python([sys.executable, str(path)], variables)
