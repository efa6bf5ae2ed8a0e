"""The resume certificate: a run that is killed again and again must end as one that never was. `mlt verify CONFIG --resume`.

The runs are those of the command itself, in processes of their own, over a few steps of the config. What one of them
computes with every interruption is compared with the uninterrupted one: the whole state, the position in the data, the
digest of every row of every batch, and every number that was logged, to the bit.
"""

import dataclasses
import itertools
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

from mlt.checkpoint.layout import CheckpointError, committed_steps
from mlt.config.check import check_run
from mlt.config.dump import config_hash
from mlt.config.run import RunConfig
from mlt.errors import EXIT_PREEMPTED, RunFailed, UserError
from mlt.parallel.mesh import Layout
from mlt.run_paths import RunPaths
from mlt.verify.resume_certificate import Certificate, Kill
from mlt.verify.resume_child import batches_seen
from mlt.verify.resume_compare import arrays, numbers, position, shown, unequal, unequal_arrays
from mlt.verify.resume_elsewhere import Elsewhere
from mlt.verify.resume_points import MOMENTS, Intervals, Watched, strike
from mlt.verify.resume_runs import Runs

SIGNALS = (signal.SIGKILL, signal.SIGTERM)
PLAN = tuple(itertools.product(SIGNALS, MOMENTS))
"""Signal and moment of each kill, in the order in which they are made; more kills start over."""

_TRIES = 5
_EVALUATED_BATCHES = 4


@dataclasses.dataclass(frozen=True)
class Options:
    """What is asked for.

    Attributes:
        steps: of every run.
        kills: how often the interrupted run is stopped.
        layout: the other mesh; None takes the first that fits.
        processes: the other number of processes; 1 leaves this part out.
        name: what the config is called in the certificate.
    """

    steps: int = 12
    kills: int = len(PLAN)
    layout: Layout | None = None
    processes: int = 2
    name: str = ""


def verify_resume(config: RunConfig, options: Options, out: Path, *, say: Callable[[str], None]) -> Certificate:
    """Make the proof and write `certificate.json` and `certificate.txt` to `out`.

    Raises:
        UserError: the config cannot run here, or there are too few steps.
        RunFailed: the uninterrupted run fails, so that there is nothing to compare with.
    """
    if options.steps < 8:
        raise UserError(f"--steps {options.steps}: too few to save, evaluate and be stopped between; give at least 8")
    if options.kills < 1 or options.processes < 1:
        raise UserError("--kills and --processes must be at least 1")
    short, at = shortened(config, options.steps)
    check_run(short)
    out.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="mlt-resume-"))
    proof = _Proof(short, options, at, place, say)
    try:
        certificate = proof.run()
    finally:
        proof.stop()
    certificate.write(out)
    if certificate.holds:
        shutil.rmtree(place)
    else:
        say(f"the runs are kept in {place}")
    return certificate


def shortened(config: RunConfig, steps: int) -> tuple[RunConfig, Intervals]:
    """The config over a few steps, with everything logged, saved often, and nothing sent or copied elsewhere."""
    at = Intervals(steps, save=max(steps // 4, 2), evaluation=max(steps // 4, 2) * 2 - 1)
    rows = config.data.batch_size * _EVALUATED_BATCHES
    return config.replace(
        train=config.train.replace(steps=steps),
        checkpoint=type(config.checkpoint)(every_steps=at.save, keep=steps),
        evaluation=config.evaluation.replace(every_steps=at.evaluation, max_rows=min(config.evaluation.max_rows or rows, rows)),
        sample=config.sample.replace(tokens=0),
        log=config.log.replace(every_steps=1, wandb=None),
    ), at


class _Proof:
    """The runs of one certificate, below one directory."""

    def __init__(self, config: RunConfig, options: Options, at: Intervals, place: Path, say: Callable[[str], None]) -> None:
        self.options, self.at, self.place, self.say = options, at, place, say
        self.runs = Runs(config, place)
        self.certificate = Certificate(options.name, config_hash(config), options.steps)
        self._complete_stories: list[Path] = []

    def run(self) -> Certificate:
        self.say(
            f"the uninterrupted run: {self.at.steps} steps, saved every {self.at.save}, evaluated every {self.at.evaluation}"
        )
        self.whole = self.place / "whole"
        if code := self.runs.start(self.whole).end():
            raise RunFailed(f"the uninterrupted run ended with {code}:\n{self.runs.last_words()}")
        self._interrupted()
        elsewhere = Elsewhere(self.runs, self.whole, self.at.steps, self.certificate, self.say)
        elsewhere.prove(self.options.layout, self.options.processes)
        # Only now does this process use a device: a child may have needed all of its memory.
        for story in self._complete_stories:
            self._compare(story)
        return self.certificate

    def _interrupted(self) -> None:
        """All kills, in as many runs as they take; each of these is then completed and compared."""
        plan = list(itertools.islice(itertools.cycle(PLAN), self.options.kills))
        if not any(name.startswith("eval/") for _, name in numbers(self.whole)):
            plan = [(number, name) for number, name in plan if name != "in evaluation"]
            self.certificate.notes.append("nothing is held out, so there is no evaluation to be stopped in")
        story: Path | None = None
        stories = itertools.count(1)
        for number, name in plan:
            kill = Kill(name, signal.Signals(number).name)
            self.certificate.kills.append(kill)
            while kill.misses < _TRIES and not kill.hit:
                story = story or self.place / f"interrupted-{next(stories)}"
                if not self._kill(story, kill, number):
                    self._complete(story)
                    story = None
            self.say(kill.text())
            if not kill.hit:
                self.certificate.find("kills", False, f"{kill.text()}: the run was always past it; give it more --steps")
        if story is not None:
            self._complete(story)

    def _kill(self, story: Path, kill: Kill, number: int) -> bool:
        """Start the run and stop it; False where it was complete before its moment came."""
        child = self.runs.start(story)
        hit = strike(child, MOMENTS[kill.where], self.at, number)
        code = child.end()
        self._check_resumed(child)
        if not hit:
            kill.misses += 1
            if code not in (0, EXIT_PREEMPTED):
                self.certificate.find("kills", False, f"a run that nothing stopped ended with {code}: {self.runs.last_words()}")
            return False
        kill.hit, kill.exit_code, kill.step = True, code, child.last_step()
        kill.committed = max(committed_steps(RunPaths(story).checkpoints_path), default=0)
        expected = -number if number == signal.SIGKILL else EXIT_PREEMPTED
        if code != expected:
            self.certificate.find("kills", False, f"{kill.text()}: ended with {code}, not {expected}: {self.runs.last_words()}")
        self._unanswered = kill
        return True

    _unanswered: Kill | None = None

    def _check_resumed(self, child: Watched) -> None:
        """Where a run went on after the kill before: no earlier than after what was committed then."""
        kill, resumed = self._unanswered, child.resumed_from()
        if kill is None or resumed is None:
            return
        self._unanswered, kill.resumed_from = None, resumed
        if resumed < kill.committed:
            self.certificate.find("kills", False, f"{kill.text()}, though step {kill.committed} was committed")

    def _complete(self, story: Path) -> None:
        """Run the same command to its end."""
        child = self.runs.start(story)
        code = child.end()
        self._check_resumed(child)
        if code:
            self.certificate.find(story.name, False, f"ended with {code}: {self.runs.last_words()}")
        else:
            self._complete_stories.append(story)

    def _compare(self, story: Path) -> None:
        """A run that was interrupted with the one that was not."""
        steps, checkpoints = self.at.steps, RunPaths(story).checkpoints_path
        try:
            expected, found = arrays(RunPaths(self.whole).checkpoints_path, steps), arrays(checkpoints, steps)
            groups = {"parameters": "model/", "optimizer state": "optimizer/", "random key": "key", "all other state": ""}
            for what, prefix in groups.items():
                mine = {path: found.pop(path) for path in list(found) if path.startswith(prefix)}
                theirs = {path: expected.pop(path) for path in list(expected) if path.startswith(prefix)}
                size = sum(array.size for array in theirs.values())
                self._bits(story, what, unequal_arrays(theirs, mine), f"{len(theirs)} arrays, {size:,} values")
            left, right = position(RunPaths(self.whole).checkpoints_path, steps), position(checkpoints, steps)
            self._bits(story, "data position", unequal(left, right), f"after {steps} steps")
            seen = batches_seen(self.runs.notes(story))
            whole_seen = batches_seen(self.runs.notes(self.whole))
            self._bits(story, "batches", unequal(whole_seen, seen), f"{len(whole_seen)} rows")
            logged = numbers(self.whole)
            self._bits(story, "metrics", unequal(logged, numbers(story)), f"{len(logged)} logged numbers")
        except (CheckpointError, ValueError) as error:
            self.certificate.find(story.name, False, str(error))

    def _bits(self, run: Path, what: str, lines: list[str], count: str) -> None:
        self.certificate.find(
            f"{run.name}: {what}", not lines, f"differ: {shown(lines)}" if lines else f"{count}, all bits equal"
        )

    def stop(self) -> None:
        """Leave no child behind."""
        self.runs.stop()
