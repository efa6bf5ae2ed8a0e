"""The resume certificate: a run that is killed again and again must end as one that never was. `mlt verify CONFIG --resume`.

The runs are those of the command itself, in processes of their own, over a few steps of the config. What one of them
computes with every interruption is compared with the uninterrupted one: the whole state, the position in the data, the
digest of every row of every batch, and every number that was logged, to the bit.
"""

import dataclasses
import itertools
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from mlt.checkpoint.layout import CheckpointError, committed_steps, step_path
from mlt.config.check import check_run
from mlt.config.dump import config_hash, to_yaml
from mlt.config.problems import ConfigError
from mlt.config.run import RunConfig
from mlt.errors import EXIT_PREEMPTED, RunFailed, UserError
from mlt.parallel.mesh import AXES, Layout
from mlt.run_paths import RunPaths
from mlt.verify.resume_certificate import Certificate, Finding, Kill
from mlt.verify.resume_child import batches_seen
from mlt.verify.resume_compare import (
    arrays,
    numbers,
    position,
    relative_difference,
    shown,
    unequal,
    unequal_arrays,
)
from mlt.verify.resume_points import MOMENTS, Intervals, Watched, strike

TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}
"""Largest relative difference of the losses on another layout, by compute type: sums are made in another order there."""

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
        self.config, self.options, self.at, self.place, self.say = config, options, at, place, say
        self.config_path = place / "config.yaml"
        self.config_path.write_text(to_yaml(config))
        self.certificate = Certificate(options.name, config_hash(config), options.steps)
        self._logs = itertools.count(1)
        self._children: list[Watched] = []
        self._complete_stories: list[Path] = []

    def run(self) -> Certificate:
        self.say(
            f"the uninterrupted run: {self.at.steps} steps, saved every {self.at.save}, evaluated every {self.at.evaluation}"
        )
        self.whole = self.place / "whole"
        if code := self._start(self.whole).end():
            raise RunFailed(f"the uninterrupted run ended with {code}:\n{self._last_words()}")
        self._interrupted()
        self._other_layouts()
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
                self._find("kills", False, f"{kill.text()}: the run was always past it; give it more --steps")
        if story is not None:
            self._complete(story)

    def _kill(self, story: Path, kill: Kill, number: int) -> bool:
        """Start the run and stop it; False where it was complete before its moment came."""
        child = self._start(story)
        hit = strike(child, MOMENTS[kill.where], self.at, number)
        code = child.end()
        self._check_resumed(child)
        if not hit:
            kill.misses += 1
            if code not in (0, EXIT_PREEMPTED):
                self._find("kills", False, f"a run that nothing stopped ended with {code}: {self._last_words()}")
            return False
        kill.hit, kill.exit_code, kill.step = True, code, child.last_step()
        kill.committed = max(committed_steps(RunPaths(story).checkpoints_path), default=0)
        expected = -number if number == signal.SIGKILL else EXIT_PREEMPTED
        if code != expected:
            self._find("kills", False, f"{kill.text()}: ended with {code}, not {expected}: {self._last_words()}")
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
            self._find("kills", False, f"{kill.text()}, though step {kill.committed} was committed")

    def _complete(self, story: Path) -> None:
        """Run the same command to its end."""
        child = self._start(story)
        code = child.end()
        self._check_resumed(child)
        if code:
            self._find(story.name, False, f"ended with {code}: {self._last_words()}")
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
            seen = batches_seen(self._notes(story))
            whole_seen = batches_seen(self._notes(self.whole))
            self._bits(story, "batches", unequal(whole_seen, seen), f"{len(whole_seen)} rows")
            logged = numbers(self.whole)
            self._bits(story, "metrics", unequal(logged, numbers(story)), f"{len(logged)} logged numbers")
        except (CheckpointError, ValueError) as error:
            self._find(story.name, False, str(error))

    def _bits(self, run: Path, what: str, lines: list[str], count: str) -> None:
        self._find(f"{run.name}: {what}", not lines, f"differ: {shown(lines)}" if lines else f"{count}, all bits equal")

    def _find(self, what: str, holds: bool, facts: str) -> None:
        self.certificate.findings.append(Finding(what, holds, facts))

    def _other_layouts(self) -> None:
        """From a checkpoint of the uninterrupted run on, on another mesh and with another number of processes."""
        middle = max(step for step in committed_steps(RunPaths(self.whole).checkpoints_path) if step <= self.at.steps // 2)
        count = self.options.processes
        layout = self.options.layout or next(self._fitting(1), None)
        if layout is None:
            self.certificate.notes.append("no other mesh of two devices fits this config; name one with --mesh")
        else:
            self._elsewhere("another mesh", layout, 1, middle)
        if count == 1:
            self.certificate.notes.append("no other number of processes was asked for")
            return
        several = layout if layout is not None and layout.num_devices % count == 0 else next(self._fitting(count), None)
        if several is None:
            self.certificate.notes.append(f"no mesh of {count} devices fits this config, so {count} processes were not tried")
        else:
            self._elsewhere(f"{count} processes", several, count, middle)

    def _fitting(self, processes: int) -> Iterator[Layout]:
        """Layouts that the config's own rules accept, other than its own; the simplest first."""
        own = self.config.mesh
        none = dict.fromkeys(AXES, 1)
        if processes == 1 and own.num_devices > 1:
            yield own.replace(**none)
            return
        size = max(processes, 2)
        for axis in ("fsdp", "replica", "tensor", "context", "expert"):
            layout = own.replace(**(none | {axis: size}))
            try:
                check_run(self.config.replace(mesh=layout))
            except ConfigError:
                continue
            yield layout

    def _elsewhere(self, what: str, layout: Layout, count: int, middle: int) -> None:
        degrees = ", ".join(f"{axis}={size}" for axis, size in layout.shape().items() if size > 1) or "one device"
        kind = self.config.train.compute_dtype
        tolerance = TOLERANCES[kind]
        name = f"{what} ({degrees})"
        self.say(f"{name}: resuming after step {middle}")
        run = self.place / what.replace(" ", "-")
        shutil.copytree(
            step_path(RunPaths(self.whole).checkpoints_path, middle), step_path(RunPaths(run).checkpoints_path, middle)
        )
        shutil.copyfile(RunPaths(self.whole).config_path, RunPaths(run).config_path)
        sets = [f"--set=mesh.{axis}={size}" for axis, size in layout.shape().items()]
        variables = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(layout.num_devices // count)}
        address = {"MLT_COORDINATOR": f"127.0.0.1:{_free_port()}", "MLT_NUM_PROCESSES": str(count)} if count > 1 else {}
        children = [
            self._start(run, *sets, **variables, **address, **({"MLT_PROCESS_ID": str(index)} if count > 1 else {}))
            for index in range(count)
        ]
        codes = [child.end() for child in children]
        if any(codes) or children[0].resumed_from() != middle:
            self._find(name, False, f"ended with {codes}: {children[0].output()[-2000:]}")
            return
        try:
            whole_seen, seen = batches_seen(self._notes(self.whole)), batches_seen(self._notes(run))
        except ValueError as error:
            self._find(f"{name}: batches", False, str(error))
            return
        start = min(tokens for tokens, _ in seen)
        expected = {key: digest for key, digest in whole_seen.items() if key[0] >= start}
        lines = unequal(expected, seen)
        steps = len({tokens for tokens, _ in expected})
        if steps != self.at.steps - middle:
            lines.append(f"{steps} batches for {self.at.steps - middle} steps")
        same = f"{len(expected)} rows of {steps} batches, all bits equal"
        self._find(f"{name}: batches", not lines, f"differ: {shown(lines)}" if lines else same)
        worst, compared = relative_difference(numbers(self.whole), numbers(run), "train/loss")
        holds = worst <= tolerance and compared == self.at.steps - middle
        facts = f"relative difference {worst:.1e} over {compared} steps (at most {tolerance:g} in {kind})"
        self._find(f"{name}: losses", holds, facts)

    def _notes(self, run: Path) -> Path:
        return self.place / f"{run.name}-batches"

    def _start(self, run: Path, *words: str, **variables: str) -> Watched:
        line = [sys.executable, "-m", "mlt.verify.resume_child", str(self._notes(run))]
        line += ["train", str(self.config_path), "--run-dir", str(run), *words]
        self._log = self.place / f"log-{next(self._logs)}.txt"
        child = Watched(line, self._environment() | variables, run, self._log)
        self._children.append(child)
        return child

    def stop(self) -> None:
        """Leave no child behind."""
        for child in self._children:
            child.kill()

    def _last_words(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]

    def _environment(self) -> dict[str, str]:
        """Of every child: this one's, a cache of compiled programs that they share, and as many CPU devices as are asked for."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MLT_") and name != "XLA_FLAGS"}
        flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in f]
        return kept | {
            "XLA_FLAGS": " ".join(flags),
            "JAX_NUM_CPU_DEVICES": str(self.config.mesh.num_devices),
            "JAX_COMPILATION_CACHE_DIR": str(self.place / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONUNBUFFERED": "1",
        }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
