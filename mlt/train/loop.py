"""The training loop: feed, step, log, evaluate, save; resume what the run directory holds."""

import collections
import functools
from pathlib import Path
from typing import Any

import jax

from mlt.checkpoint.restore import Restored
from mlt.config.check import check_run
from mlt.config.run import RunConfig
from mlt.data.loader import Loader, WaitStopped, open_loader
from mlt.errors import Preempted
from mlt.parallel.devices import split_axes
from mlt.plan.text import plan_text
from mlt.report.console import RunConsole, open_console
from mlt.report.profile import Profiler
from mlt.report.sinks import open_sinks
from mlt.train.between import evaluate, sample
from mlt.train.checkpoints import open_checkpointer
from mlt.train.clock import Clock
from mlt.train.clusters import keep_tree
from mlt.train.collisions import write_collisions
from mlt.train.compiling import Compiler
from mlt.train.distributed import agree_on, joined, meet
from mlt.train.ending import say_what_next, start_facts
from mlt.train.evaluate import Evaluator
from mlt.train.peers import ALONE, Alone
from mlt.train.processes import Processes
from mlt.train.repeat import step_twice
from mlt.train.residents import num_hosts
from mlt.train.rolling_back import roll_back
from mlt.train.run_config import check_config, keep_config
from mlt.train.run_directory import RunDirectory
from mlt.train.saving import Saver, restore_newest
from mlt.train.services import open_services
from mlt.train.setup import Setup, prepare
from mlt.train.signals import StopRequest
from mlt.train.skips import Course, Flight, RollBack
from mlt.train.state import TrainState, abstract_state

STEPS_IN_FLIGHT = 2


def train(config: RunConfig, run_dir: Path, processes: Processes | None = None) -> None:
    """Start a run, or resume what `run_dir` holds.

    Args:
        config: what to train.
        run_dir: where the run lives; the same directory for all its processes.
        processes: this process's place among those of the run; None where it is the only one.

    Raises:
        UserError: the config, data, mesh or directory is wrong; where no step was taken, a new directory is gone again.
        Preempted: a signal asked to stop; what there was to save is saved.
        RunFailed: it cannot go on: too many skipped steps, a last save that fails, devices that do not repeat a step.
        PeerLost: another process died.
    """
    check_run(config)
    with joined(processes, config) as peers:
        rules = config.mesh.rules()
        directory = RunDirectory(run_dir)
        with StopRequest() as stop, directory.lock():
            check_config(directory, config)
            meet("run directory")
            log_path = directory.process_log_path(peers.index)
            console = open_console(config.train.steps, process=peers.index, log_path=log_path)
            try:
                setup = prepare(config, rules, (lambda: stop.name) if peers.count == 1 else None)
            except WaitStopped:
                raise Preempted(
                    f"{stop.name}: while documents were read, with nothing to save; run the same command again"
                ) from None
            console.say(setup.corpus.describe())
            agree_on("the corpus", setup.corpus.hash)
            loop = Loop(setup, directory, console, stop, peers)
            with loop.watchdog:
                loop.run()


class Loop:
    """One process's part in a run."""

    def __init__(self, setup: Setup, directory: RunDirectory, console: RunConsole, stop: StopRequest, peers: Alone = ALONE):
        self.setup, self.config, self.directory = setup, setup.config, directory
        self.console, self.peers = console, peers
        self.evaluator = Evaluator(setup)
        self.feed = self.evaluator.feed
        self.tables = self.evaluator.tables = setup.host_tables()
        self.services = open_services(setup, directory, console, stop, peers)
        self.stopping, self.watchdog, self.skips = self.services.stopping, self.services.watchdog, self.services.skips
        self.goodput, self.book = self.services.goodput, self.services.book
        self.course = Course(from_seed=True)
        self.profiler = Profiler(self.config.log.profile, directory.profile_path(peers.index))
        self._compiler = Compiler(self.services)

    def run(self) -> None:
        abstract = abstract_state(self.setup.specs, self.setup.optimizer, self.setup.rules)
        plan = plan_text(self.config, self.setup.whole_specs, num_hosts(self.config, self.setup.rules))
        for line in keep_config(self.directory, self.config):
            self.console.say(f"config: {line}")
        keep_tree(self.directory.clusters_path, self.config, self.setup.corpus, write=self.peers.index == 0)
        if self.peers.index == 0:
            with self.book.tolerating("the plan"):
                self.directory.plan_path.write_text(plan)
            with self.book.tolerating("the collision statistics"):
                write_collisions(self.directory.collisions_path, self.setup)
        self.console.say(plan)
        mesh = self.setup.rules.mesh
        if self.peers.count > 1 and isinstance(mesh, jax.sharding.Mesh):
            crossing = ", ".join(split_axes(mesh.devices, mesh.axis_names))
            self.console.say(f"processes    {self.peers.count}; between machines: {crossing}")
        with open_checkpointer(self.config.checkpoint, self.directory) as checkpointer:
            self.checkpointer, self.saver = checkpointer, Saver(self.services, checkpointer)
            self._train(restore_newest(self.services, checkpointer, self.tables.whole_abstract(abstract)), abstract)

    def _train(self, restored: Restored | None, abstract: TrainState) -> None:
        steps = self.config.train.steps
        first = 0 if restored is None else restored.step
        # An evaluation that a request to stop cut off comes first.
        due = restored is not None and bool(restored.meta.get("evaluation_due"))
        if restored is not None:
            self.course = Course.from_meta(restored.meta)
        if restored is not None and first == steps and not due:
            self.console.say(f"this run is complete: {steps} steps")
            self._finish(restored.state)
            return
        with open_sinks(self.config.log, self.directory, first) as sinks:
            self.sinks = sinks
            sinks.start(start_facts(self.setup, first, self.peers.count))
            self.goodput.start(first)
            step_fn = self.compile_step(abstract)
            self.compile_evaluation = functools.cache(lambda: self._compiler.evaluation(self.evaluator, abstract))
            state = self.tables.begin(self.setup.fresh_state() if restored is None else restored.state)
            # A new run has read no data yet, nor has an imported model.
            position = None if restored is None else restored.data or None
            self.stopping.pass_point()
            if self.stopping.name is not None or (due and not self._evaluate(first, state)):
                raise self.stopping.preempted(f"before step {first + 1}, with nothing to save")
            self.directory.begun = True
            self._finish(self._to_the_end(step_fn, abstract, state, first, position))

    def _to_the_end(self, step_fn: Any, abstract: TrainState, state: TrainState, first: int, position: Any) -> TrainState:
        """All steps that are left, with as many rollbacks as it takes."""
        while True:
            places = self.setup.hashes.reads or self.feed.places
            options = {"places": places, "stop": self.stopping.while_loading, "extend": self.setup.hashes}
            loader = open_loader(self.config.data, self.setup.corpus, state=position, **options)
            try:
                return self.steps(step_fn, state, first, self.config.train.steps, loader)
            except RollBack as rollback:
                asked = rollback.with_traceback(None)  # whose frames hold the state
            del state
            whole = self.tables.whole_abstract(abstract)
            back = roll_back(asked, self.course, self.services, self.checkpointer, whole, self.sinks)
            (state, first, self.course), position = back, asked.position
            state = self.tables.begin(state)

    def steps(self, step_fn: Any, state: TrainState, first: int, last: int, loader: Loader) -> TrainState:
        """Steps first + 1 to last with everything around them.

        Raises:
            Preempted: asked to stop; the state is saved.
            RollBack: too many steps in a row were skipped.
        """
        config, steps = self.config, self.config.train.steps
        clock = Clock(self.setup.tokens_per_step)
        in_flight: collections.deque[Flight] = collections.deque()
        pending: Flight | None = None
        position = loader.state()
        self.skips.documents = loader.rows.documents
        self.console.start(first)
        if self.profiler.turns(first):
            self._tell(self.profiler.turn(first))
        clock.reset(first)
        step = first
        try:
            with self.goodput.during("step"):
                for step in range(first + 1, last + 1):
                    self.watchdog.progress(f"step {step}")
                    try:
                        with self.goodput.during("data"):
                            batch = next(loader)
                    except WaitStopped:
                        self.stopping.heed()
                        self._settle_all(in_flight, pending, clock)
                        self._leave(step - 1, state, position, save=step - 1 > first)
                    clock.waited(loader.last_wait_seconds)
                    before, position = position, loader.state()
                    state, fed = self.tables.enter(state, batch)
                    state, metrics = self._step(step, step_fn, state, self.feed(fed))
                    self.tables.leave(state)
                    # The device works on this step while the host logs the one before.
                    if pending is not None:
                        self.book.log(pending, clock, self.sinks)
                        pending = None
                        # Beside the steps, but not before the first loss is on the screen.
                        self.compile_evaluation()
                    in_flight.append(Flight(step, metrics, batch, before, position))
                    if len(in_flight) > STEPS_IN_FLIGHT:
                        self._settle(in_flight.popleft())
                    if step % config.log.every_steps == 0 or step in (1, steps):
                        pending = in_flight[-1]
                    self.stopping.pass_point()
                    pausing = step % config.evaluation.every_steps == 0 or step == steps
                    saving = step % config.checkpoint.every_steps == 0
                    tracing = step < last and self.profiler.turns(step)
                    if not (pausing or saving or tracing or self.stopping.name is not None):
                        continue
                    self._settle_all(in_flight, pending, clock)
                    pending = None
                    if tracing:
                        self._tell(self.profiler.turn(step))
                    # Evaluated before it is saved: a kill in between repeats both, one after it loses neither.
                    due = pausing and not self._evaluate(step, state)
                    if self.stopping.name is not None and (step < steps or due):
                        self._leave(step, state, position, due=due)
                    # Within a row of skipped steps there is nothing new to save, and the way back is to stay open.
                    if step == steps or (saving and not self.skips.in_a_row):
                        self.saver.persist(step, self.tables.whole(state), position, self.course)
                    clock.reset(step)
        finally:
            self._tell(self.profiler.close(step))
            self.console.stop()
            loader.close()
        return state

    def _step(self, step: int, step_fn: Any, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        """One step; done twice and compared where the config asks for it."""
        every = self.config.train.check_every_steps
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            if every is None or step % every:
                return step_fn(state, batch)
            return step_twice(step, step_fn, state, batch, self.services)

    def _tell(self, line: str | None) -> None:
        if line is not None:
            self.console.say(line)

    def compile_step(self, abstract: TrainState) -> Any:
        """The compiled step. It takes exactly these shapes: a recompile is an error, not a delay."""
        return self._compiler.step(abstract)

    def _settle(self, flight: Flight) -> None:
        self.goodput.stepped(skipped=self.skips.settle(flight))

    def _settle_all(self, in_flight: collections.deque[Flight], pending: Flight | None, clock: Clock) -> None:
        """Wait for every step that was started, and log the last if it is to be."""
        if pending is not None:
            self.book.log(pending, clock, self.sinks)
        while in_flight:
            self._settle(in_flight.popleft())

    def _evaluate(self, step: int, state: TrainState) -> bool:
        """Whether it was done; not where the run is to stop before it, or stops in it."""
        return evaluate(step, state, self.services, self.evaluator, self.compile_evaluation, self.sinks)

    def _leave(self, step: int, state: TrainState, data: dict[str, Any], *, due: bool = False, save: bool = True) -> None:
        """Save what there is and end, as asked."""
        if save:
            self.saver.persist(step, self.tables.whole(state), data, self.course, due)
        self.goodput.note(step)
        where = f"saved step {step} in {self.directory.checkpoints_path}" if save else f"step {step} was saved before"
        raise self.stopping.preempted(where if step else "before step 1, with nothing to save")

    def _finish(self, state: TrainState) -> None:
        sample(self.config.train.steps, state, self.services)
        self.watchdog.progress("the end of the run")
        self.checkpointer.wait()
        self.goodput.note(self.config.train.steps)
        if self.peers.index == 0:
            say_what_next(self.directory, self.console)
