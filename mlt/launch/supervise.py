"""Processes of one attempt at a run: started together, logged, signalled together, and none left behind."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import IO

from mlt.errors import EXIT_PREEMPTED

_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_LOOK_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class Program:
    """A process to start: its words, the variables it gets besides ours, and where what it prints is kept."""

    words: Sequence[str]
    variables: Mapping[str, str]
    log_path: Path


@dataclasses.dataclass(frozen=True)
class Ended:
    """Attributes:
    codes: exit code of each process; negative, the signal that killed it.
    asked: the first signal that this command got meanwhile.
    """

    codes: list[int]
    asked: int | None


def supervise(programs: Sequence[Program], directory: PurePath, grace_seconds: float, say: Callable[[str], None]) -> Ended:
    """Run programs to their ends; the first one's output is shown as well as logged.

    A signal to this process goes to all of them. After one failed, the others have `grace_seconds` to notice and end;
    then they are killed. They are killed as well where this function is left by an exception.
    """
    running: list[subprocess.Popen[bytes]] = []
    copying: list[threading.Thread] = []
    with _passing_on(running) as asked:
        try:
            for index, program in enumerate(programs):
                process = _start(program, directory)
                running.append(process)
                assert process.stdout is not None
                shown = sys.stdout.buffer if index == 0 and hasattr(sys.stdout, "buffer") else None
                copy = threading.Thread(target=_copy, args=(process.stdout, program.log_path, shown), daemon=True)
                copy.start()
                copying.append(copy)
            _wait(running, grace_seconds, say)
        finally:
            for process in running:
                _kill(process)
            for copy in copying:
                copy.join(timeout=5)
    return Ended([process.returncode for process in running], asked[0] if asked else None)


def _start(program: Program, directory: PurePath) -> subprocess.Popen[bytes]:
    program.log_path.parent.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        program.words,
        env=_inherited() | dict(program.variables),
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a terminal's Ctrl-C comes from us alone, once
    )


def _inherited() -> dict[str, str]:
    """This process's variables, but for those that would tell a process its place in some other run."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MLT_")}


def _copy(source: IO[bytes], log_path: Path, shown: IO[bytes] | None) -> None:
    """Read to the end whatever becomes of it: a process whose output nobody reads stops as soon as the pipe is full."""
    with contextlib.ExitStack() as files:
        kept = None
        with contextlib.suppress(OSError):
            kept = files.enter_context(log_path.open("ab", buffering=0))
        while block := os.read(source.fileno(), 1 << 16):
            for place in (kept, shown):
                if place is not None:
                    with contextlib.suppress(OSError, ValueError):  # a full disk or a closed terminal ends no run
                        place.write(block)
                        place.flush()


def _wait(running: Sequence[subprocess.Popen[bytes]], grace_seconds: float, say: Callable[[str], None]) -> None:
    deadline: float | None = None
    while any(process.poll() is None for process in running):
        failed = [i for i, process in enumerate(running) if process.returncode not in (None, 0, EXIT_PREEMPTED)]
        if failed and deadline is None:
            deadline = time.monotonic() + grace_seconds
        if deadline is not None and time.monotonic() > deadline:
            left = [i for i, process in enumerate(running) if process.returncode is None]
            say(
                f"mlt launch: process {failed[0]} ended with {running[failed[0]].returncode}, and {', '.join(map(str, left))} "
                f"did not end within {grace_seconds:g} s: killed"
            )
            return
        time.sleep(_LOOK_SECONDS)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it started, if it runs."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def _passing_on(running: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Give every signal to all that run; yields those that came."""
    asked: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        asked.append(number)
        for process in running:
            if process.poll() is None:
                # A closed terminal asks for the same as the others do.
                process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    # Under nohup the terminal may go.
    heard = [number for number in _PASSED_ON if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, pass_on) for number in heard}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
