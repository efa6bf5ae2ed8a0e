"""Moments of a run in which it is stopped, found from outside: by what it has printed and written so far.

A child is frozen (SIGSTOP) when a moment seems to have come, looked at while it cannot move, and only then given its
signal; otherwise it runs on. So a stop that counts was where it says it was.
"""

import dataclasses
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from mlt.checkpoint.layout import committed_steps, unfinished
from mlt.run_paths import RunPaths
from mlt.verify.resume_compare import rows

_LOOK_SECONDS = 0.0005
_TIMEOUT_SECONDS = 3600.0


@dataclasses.dataclass(frozen=True)
class Intervals:
    """Of the runs that are compared: steps in all, between saves, and between evaluations."""

    steps: int
    save: int
    evaluation: int


class Watched:
    """A child that trains, its output, and what it found on the disk when it began."""

    def __init__(self, line: list[str], environment: dict[str, str], run_dir: Path, log_path: Path) -> None:
        self.paths, self.log_path = RunPaths(run_dir), log_path
        self.committed = set(committed_steps(self.paths.checkpoints_path))
        self._left = self._half_written()
        with log_path.open("wb") as log:
            self.process = subprocess.Popen(line, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)

    def output(self) -> str:
        return self.log_path.read_text(errors="replace")

    def resumed_from(self) -> int | None:
        """The step it went on after; 0 where it began anew, None where it ended before either."""
        text = self.output()
        if found := re.search(r"resuming after step (\d+)", text):
            return int(found[1])
        return 0 if "compiling the train step" in text else None

    def training(self) -> bool:
        """Whether it is past its compilation: then no row of an earlier process is left that it would write again."""
        return "compiled in" in self.output()

    def new_commits(self) -> set[int]:
        return set(committed_steps(self.paths.checkpoints_path)) - self.committed

    def saving(self) -> bool:
        """Whether files of a step lie there that is not committed, and that this child made."""
        return bool(self._half_written() - self._left)

    def last_step(self) -> int:
        return max((row["step"] for row in rows(self.paths.path) if "train/loss" in row), default=0)

    def freeze(self) -> bool:
        """Stop every thread of the child; False where it has ended."""
        if self.process.poll() is not None:
            return False
        self.process.send_signal(signal.SIGSTOP)
        _, status = os.waitpid(self.process.pid, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            return True
        self.process.returncode = os.waitstatus_to_exitcode(status)
        return False

    def thaw(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)

    def end(self) -> int:
        """Wait for the end; the exit code."""
        try:
            return self.process.wait(timeout=_TIMEOUT_SECONDS)
        finally:
            self.kill()

    def kill(self) -> None:
        """End it, if it runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def _half_written(self) -> set[tuple[str, int]]:
        found = set()
        for path in unfinished(self.paths.checkpoints_path):
            try:
                found.add((path.name, path.stat().st_ino))
            except FileNotFoundError:
                continue
        return found


Moment = Callable[[Watched, Intervals], bool]


def in_compilation(child: Watched, at: Intervals) -> bool:
    return "compiling the train step" in child.output() and not child.training()


def before_a_save(child: Watched, at: Intervals) -> bool:
    """A step is logged that no checkpoint has, and none is being written."""
    if not child.training():
        return False
    last = child.last_step()
    newest = max(child.committed | child.new_commits(), default=0)
    return not child.saving() and newest < last < (newest // at.save + 1) * at.save and last < at.steps


def during_a_save(child: Watched, at: Intervals) -> bool:
    return child.saving() and child.last_step() < at.steps


def after_a_commit(child: Watched, at: Intervals) -> bool:
    return bool(new := child.new_commits()) and max(new) < at.steps


def in_evaluation(child: Watched, at: Intervals) -> bool:
    """The step before an evaluation is logged, and the evaluation is not."""
    if not child.training():
        return False
    found = [row for row in rows(child.paths.path) if row["step"] and ("train/loss" in row or "eval/loss" in row)]
    if not found or "eval/loss" in found[-1]:
        return False
    step = found[-1]["step"]
    return step % at.evaluation == 0 and step < at.steps


MOMENTS: dict[str, Moment] = {
    "in compilation": in_compilation,
    "before a save": before_a_save,
    "during a save": during_a_save,
    "right after a commit": after_a_commit,
    "in evaluation": in_evaluation,
}


def strike(child: Watched, moment: Moment, at: Intervals, number: int) -> bool:
    """Send a signal at a moment; False where the child ended without one."""
    end = time.monotonic() + _TIMEOUT_SECONDS
    while child.process.poll() is None and time.monotonic() < end:
        if moment(child, at):
            if not child.freeze():
                return False
            if moment(child, at):
                child.process.send_signal(number)
                child.thaw()
                return True
            child.thaw()
        time.sleep(_LOOK_SECONDS)
    return False
