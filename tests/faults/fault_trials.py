"""Randomized trials: something befalls a run, the same command goes on, and the end must be that of an uninterrupted run."""

import contextlib
import dataclasses
import pathlib
import random
import re
import shutil
import signal
import time
from collections.abc import Callable

import fault_kinds as kinds
import numpy as np
from fork_server import Child, ForkServer

from mlt.checkpoint.layout import CheckpointError, committed_steps, unfinished
from mlt.run_paths import RunPaths
from mlt.verify.resume_compare import Numbers, arrays, numbers, position, rows, shown, unequal, unequal_arrays

STEPS = 24
SETS = (
    *("data.sequence_length=32", "data.batch_size=2", "train.compute_dtype=float32", "evaluation.max_rows=2"),
    *("evaluation.every_steps=10", "checkpoint.every_steps=4", "checkpoint.keep=3"),
)
WORDS = ("--arg", "plain=true", "--arg", "width=16", "--arg", f"steps={STEPS}", *(w for line in SETS for w in ("--set", line)))
TINY = pathlib.Path(__file__).parent / "tiny.py"
_AGAIN = 4  # starts of the same command after the faults, of which one must complete the run


@dataclasses.dataclass(frozen=True)
class Whole:
    """How an uninterrupted run ended."""

    numbers: Numbers
    arrays: dict[str, np.ndarray]
    position: dict

    @classmethod
    def of(cls, run_dir: pathlib.Path) -> "Whole":
        checkpoints = RunPaths(run_dir).checkpoints_path
        return cls(numbers(run_dir), arrays(checkpoints, STEPS), position(checkpoints, STEPS))


@dataclasses.dataclass
class Outcome:
    """What a trial showed.

    Attributes:
        number: of the trial; with the seed of the suite it draws everything.
        kind: what befell the run.
        story: what happened, part by part.
        failures: what should not have been; empty where all holds.
        hits: faults that found the run under way.
        faults: faults in all.
        lost: steps done twice, for each resume.
        starts: how often the command was started.
        leftovers: files of failed saves that lie beside the checkpoints in the end.
        seconds: processor time of all of them.
        wall: from the first start to the end.
    """

    number: int
    kind: str
    story: list[str] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)
    hits: int = 0
    faults: int = 0
    lost: list[int] = dataclasses.field(default_factory=list)
    starts: int = 0
    leftovers: int = 0
    seconds: float = 0.0
    wall: float = 0.0


class Trial:
    """One run directory and what befalls it."""

    def __init__(self, server: ForkServer, place: pathlib.Path, rng: random.Random, outcome: Outcome) -> None:
        self.server, self.place, self.rng, self.outcome = server, place, rng, outcome
        self.paths = RunPaths(place / "disk" / "run")
        self.logged: Numbers = {}
        self.floor = 0  # the newest step that must not be lost
        self.before = 0  # the last step whose loss was logged
        self.damaged: set[int] = set()  # steps that were damaged and that no start has set aside yet

    def start(self) -> Child:
        self.outcome.starts += 1
        log = self.place / f"log-{self.outcome.starts}.txt"
        return self.server.start(["train", str(TINY), "--run-dir", str(self.paths.path), *WORDS], log)

    def ended(self, child: Child, *allowed: int) -> int:
        """Take in what an ended child left, and hold it to what must be."""
        code = child.wait()
        output = child.output()
        self.outcome.seconds += child.seconds
        self.outcome.story.append(f"ended with {code}")
        # With every checkpoint damaged a run says so first, and begins again the next time.
        if code not in allowed and not (code == 2 and "none of the checkpoints in" in output):
            self.fail(f"ended with {code}, not {' or '.join(map(str, allowed))}: {output[-1500:]}")
        resumed = re.search(r"resuming after step (\d+)", output)
        began = resumed is not None or "compiling the train step" in output
        if began:
            step = int(resumed[1]) if resumed else 0
            if step < self.floor:
                self.fail(f"resumed after step {step}, though step {self.floor} was committed and whole")
            if self.outcome.starts > 1:
                self.outcome.lost.append(max(self.before - step, 0))
        if (saved := re.search(r"saved step (\d+)", output)) and int(saved[1]) not in committed_steps(
            self.paths.checkpoints_path
        ):
            self.fail(f"said that step {saved[1]} was saved, and it is not")
        self.take_in()
        return code

    def take_in(self) -> None:
        """Remember what is logged and committed."""
        try:
            for key, value in numbers(self.paths.path).items():
                if self.logged.setdefault(key, value) != value:
                    self.fail(f"{key} was {self.logged[key]!r}, and is {value!r}")
        except ValueError as error:
            self.fail(str(error))
        self.before = kinds.last_step(self.paths)
        place = self.paths.checkpoints_path
        self.damaged = {step for step in self.damaged if not list(place.glob(f"{step}.damaged*"))}
        self.floor = max(set(committed_steps(place)) - self.damaged, default=0)

    def fail(self, words: str) -> None:
        self.outcome.failures.append(words)

    def hit(self, child: Child, *, early: bool = True) -> bool:
        """Wait for a random moment; False where the run ended before it."""
        self.outcome.faults += 1
        try:
            self.outcome.story.append(kinds.moment(child, self.paths, self.rng, STEPS, early=early))
        except kinds.Ended:
            self.outcome.story.append("too late")
            return False
        self.outcome.hits += 1
        return True


def kill(trial: Trial, *, after_a_commit: bool = False) -> None:
    child = trial.start()
    if after_a_commit:
        with contextlib.suppress(kinds.Ended):
            kinds.until(child, lambda: bool(committed_steps(trial.paths.checkpoints_path)))
    if trial.hit(child, early=not after_a_commit):
        child.signal(signal.SIGKILL)
    trial.ended(child, -signal.SIGKILL, 0)


def ask(trial: Trial) -> None:
    """A request to stop. Before the run listens, a signal simply ends the process (Ctrl-C with code 1)."""
    child = trial.start()
    number = trial.rng.choice(kinds.SIGNALS)
    if trial.hit(child):
        child.signal(number)
        trial.outcome.story.append(number.name)
    began = trial.paths.metrics_path.exists()
    code = trial.ended(child, 75, 0, -number, *([1, 130] if number == signal.SIGINT else []))
    if code in (1, 130, -number) and began and "step " in child.output():
        trial.fail(f"{number.name} was not honoured: ended with {code}")


def ask_twice(trial: Trial) -> None:
    """A request to stop, and a kill while the state is being saved."""
    child = trial.start()
    if trial.hit(child):
        child.signal(signal.SIGTERM)
        time.sleep(trial.rng.uniform(0.0, 0.1))
        child.signal(signal.SIGKILL)
    trial.ended(child, -signal.SIGKILL, -signal.SIGTERM, 75, 0)


def _damaging(how: str) -> Callable[[Trial], None]:
    def fault(trial: Trial) -> None:
        kill(trial, after_a_commit=True)
        found = kinds.damage_newest(trial.paths, trial.rng, how)
        if found is None:
            trial.outcome.story.append("no checkpoint to damage")
            return
        step, words = found
        trial.outcome.story.append(words)
        trial.damaged.add(step)
        trial.floor = max(set(committed_steps(trial.paths.checkpoints_path)) - trial.damaged, default=0)

    return fault


def cut_metrics(trial: Trial) -> None:
    kill(trial, after_a_commit=True)
    trial.outcome.story.append(kinds.cut_mid_line(trial.paths.metrics_path, trial.rng) or "no metrics yet")
    trial.before = kinds.last_step(trial.paths)


def cut_config(trial: Trial) -> None:
    kill(trial, after_a_commit=trial.rng.random() < 0.7)
    trial.outcome.story.append(kinds.cut_mid_line(trial.paths.config_path, trial.rng) or "no config yet")


def full_disk(trial: Trial) -> None:
    """No room for a while, which may be until the run ends."""
    child = trial.start()
    if trial.hit(child, early=False):
        filler = kinds.fill(trial.paths.path.parent, trial.rng.randrange(400_000))
        try:
            if trial.rng.random() < 0.5:
                with contextlib.suppress(kinds.Ended):
                    end = time.monotonic() + trial.rng.uniform(0.05, 0.5)
                    kinds.until(child, lambda: time.monotonic() >= end)
            else:
                child.wait()
        finally:
            filler.unlink(missing_ok=True)
    trial.ended(child, 0, 1, 2)


def read_only(trial: Trial) -> None:
    """The disk can only be read for a while, which may be until the run ends."""
    child = trial.start()
    if trial.hit(child, early=False):
        place = trial.paths.path
        if trial.paths.checkpoints_path.is_dir() and trial.rng.random() < 0.5:
            place = trial.paths.checkpoints_path
        trial.outcome.story.append(f"{place.name} read-only")
        with kinds.read_only(place):
            if trial.rng.random() < 0.5:
                with contextlib.suppress(kinds.Ended):
                    end = time.monotonic() + trial.rng.uniform(0.05, 0.5)
                    kinds.until(child, lambda: time.monotonic() >= end)
            else:
                child.wait()
    trial.ended(child, 0, 1, 2)


KINDS: dict[str, Callable[[Trial], None]] = {
    "SIGKILL": kill,
    "SIGTERM, SIGUSR1, SIGINT": ask,
    "SIGTERM, then SIGKILL": ask_twice,
    "checkpoint file cut": _damaging("truncate"),
    "checkpoint bits flipped": _damaging("flip"),
    "checkpoint file deleted": _damaging("delete"),
    "metrics.jsonl cut": cut_metrics,
    "config.yaml cut": cut_config,
    "disk full": full_disk,
    "disk read-only": read_only,
}
MOUNTING = ("disk full", "disk read-only")


def run_trial(
    server: ForkServer, place: pathlib.Path, whole: Whole, seed: int, number: int, kind: str, *, mounts: bool
) -> Outcome:
    """One trial of a kind; now and then a second fault of any kind befalls the resumed run."""
    rng = random.Random(f"{seed}/{number}")
    outcome = Outcome(number, kind)
    trial = Trial(server, place, rng, outcome)
    started = time.monotonic()
    second = rng.choice([name for name in KINDS if mounts or name not in MOUNTING]) if rng.random() < 0.15 else None
    disk = kinds.small_disk(place / "disk") if kind in MOUNTING or second in MOUNTING else contextlib.nullcontext()
    with disk:
        for name in (kind, second):
            if name is not None:
                outcome.story.append(f"[{name}]")
                KINDS[name](trial)
        _go_on(trial)
        _judge(trial, whole)
    outcome.wall = time.monotonic() - started
    if not outcome.failures:
        shutil.rmtree(place)
    return outcome


def _go_on(trial: Trial) -> None:
    for _ in range(_AGAIN):
        trial.outcome.story.append("[the same command]")
        if trial.ended(trial.start(), 0) == 0:
            return
    trial.fail(f"not complete after {_AGAIN} starts")


def _judge(trial: Trial, whole: Whole) -> None:
    """The same numbers, state and position as the uninterrupted run; a directory that is whole and free."""
    checkpoints = trial.paths.checkpoints_path
    if lines := unequal(whole.numbers, trial.logged):
        trial.fail(f"logged otherwise (whole run, this one): {shown(lines)}")
    try:
        if paths := unequal_arrays(whole.arrays, arrays(checkpoints, STEPS)):
            trial.fail(f"another final state: {shown(paths)}")
        if lines := unequal(whole.position, position(checkpoints, STEPS)):
            trial.fail(f"another position in the data: {shown(lines)}")
    except CheckpointError as error:
        trial.fail(str(error))
    steps = [row["step"] for row in rows(trial.paths.path) if "train/loss" in row]
    if len(steps) != len(set(steps)):
        trial.fail(f"metrics.jsonl has steps twice: {steps}")
    # Nothing reads what a failed save left; the next process that saves deletes it.
    trial.outcome.leftovers = len(unfinished(checkpoints))
    if trial.paths.in_use():
        trial.fail("the directory is still locked")
