"""The training loop: feed, step, log, evaluate, save; resume what the run directory holds."""

import collections
import contextlib
import functools
import itertools
import json
import time
from pathlib import Path
from typing import Any

import jax

from mlt.checkpoint.layout import CheckpointError
from mlt.checkpoint.restore import Restored
from mlt.config.check import check_run
from mlt.config.dump import config_hash
from mlt.config.run import RunConfig
from mlt.data.loader import Loader, WaitStopped, open_loader
from mlt.errors import Preempted, RunFailed, UserError
from mlt.parallel.devices import split_axes
from mlt.plan.text import plan_text
from mlt.report.console import RunConsole, open_console
from mlt.report.sinks import open_sinks, tolerant_rows, truncate_rows
from mlt.train.background import Task, Worker
from mlt.train.checkpoints import note_durable, open_checkpointer
from mlt.train.clock import Clock
from mlt.train.distributed import agree_on, anyone_says, first_says, joined, meet
from mlt.train.ending import say_what_next, start_facts
from mlt.train.evaluate import Evaluator
from mlt.train.goodput import Goodput
from mlt.train.logbook import Logbook
from mlt.train.peers import ALONE, Alone
from mlt.train.processes import Processes
from mlt.train.repeat import copied, differences
from mlt.train.run_config import check_config, keep_config
from mlt.train.run_directory import RunDirectory
from mlt.train.sample import draw_text, sampled_steps
from mlt.train.setup import Setup, prepare
from mlt.train.signals import StopRequest
from mlt.train.skips import Course, Flight, RollBack, SkipWatch, way_back
from mlt.train.state import TrainState, abstract_batch, abstract_state, create_state
from mlt.train.step import jit_train_step
from mlt.train.throughput import program_bytes
from mlt.train.watchdog import Watchdog

STEPS_IN_FLIGHT = 2
SAVE_RETRY_SECONDS = (2.0, 8.0)  # between attempts at the last save of a process
_POLL_SECONDS = 0.1  # how often a wait looks for a request to stop


def train(config: RunConfig, run_dir: Path, processes: Processes | None = None) -> None:
    """Start a run, or resume what `run_dir` holds.

    Args:
        config: what to train.
        run_dir: where the run lives; the same directory for all its processes.
        processes: this process's place among those of the run; None where it is the only one.

    Raises:
        UserError: the config, data, mesh or directory is wrong; nothing has been written then.
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


class _StoppedEarly(Exception):
    """An evaluation was given up because the run is to stop."""


class Loop:
    """One process's part in a run."""

    def __init__(self, setup: Setup, directory: RunDirectory, console: RunConsole, stop: StopRequest, peers: Alone = ALONE):
        self.setup, self.config = setup, setup.config
        self.directory, self.console, self.stop, self.peers = directory, console, stop, peers
        self.evaluator = Evaluator(setup)
        self.feed = self.evaluator.feed
        train = self.config.train
        self.watchdog = Watchdog(train.hang_timeout_seconds, directory.stacks_path(peers.index), tell=peers.leave)
        self.stopping: str | None = None
        self.course = Course(from_seed=True)
        self._points, self._saving = itertools.count(), False
        self._compiling = Worker("mlt-compile")
        # The others have the same numbers.
        rows = tolerant_rows if peers.index == 0 else lambda path: lambda row: None
        goodput_path, skipped_path = directory.logs_path / "goodput.jsonl", directory.logs_path / "skipped.jsonl"
        self.goodput = Goodput(goodput_path, write=rows(goodput_path))
        self.book = Logbook(setup, console, self.goodput)
        self.skips = SkipWatch(
            train.guard,
            write=rows(skipped_path),
            say=console.say,
            advice=f"The checkpoints in {directory.checkpoints_path} are from before; {skipped_path} says what was skipped. "
            "Lower optimizer.learning_rate or train.clip_norm, or look at those documents, and start a new run",
        )

    def run(self) -> None:
        abstract = abstract_state(self.setup.specs, self.setup.optimizer, self.setup.rules)
        plan = plan_text(self.config, self.setup.specs)
        for line in keep_config(self.directory, self.config):
            self.console.say(f"config: {line}")
        if self.peers.index == 0:
            with self.book.tolerating("the plan"):
                self.directory.plan_path.write_text(plan)
        self.console.say(plan)
        mesh = self.setup.rules.mesh
        if self.peers.count > 1 and isinstance(mesh, jax.sharding.Mesh):
            crossing = ", ".join(split_axes(mesh.devices, mesh.axis_names))
            self.console.say(f"processes    {self.peers.count}; between machines: {crossing}")
        with open_checkpointer(self.config.checkpoint, self.directory) as checkpointer:
            self.checkpointer = checkpointer
            self._train(self._restore(abstract), abstract)

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
            compile_evaluation = functools.partial(self.evaluator.compile, abstract.model)
            self.compile_evaluation = functools.cache(lambda: self._compiling.do(compile_evaluation))
            if restored is None:
                state = create_state(self.setup.specs, self.setup.optimizer, self.setup.rules, self.config.train.seed)
            else:
                state = restored.state
            # A new run has read no data yet, nor has an imported model.
            position = None if restored is None else restored.data or None
            self._pass_point()
            if self.stopping is not None or (due and not self._evaluate(first, state)):
                raise self._preempted(f"before step {first + 1}, with nothing to save")
            self._finish(self._to_the_end(step_fn, abstract, state, first, position))

    def _to_the_end(self, step_fn: Any, abstract: TrainState, state: TrainState, first: int, position: Any) -> TrainState:
        """All steps that are left, with as many rollbacks as it takes."""
        while True:
            # With several processes a request waits for the batch: the others may be in the step that needs it.
            stop = (lambda: self.stop.name) if self.peers.count == 1 else None
            loader = open_loader(self.config.data, self.setup.corpus, state=position, places=self.feed.places, stop=stop)
            try:
                return self.steps(step_fn, state, first, self.config.train.steps, loader)
            except RollBack as rollback:
                asked = rollback.with_traceback(None)  # whose frames hold the state
            del state
            state, first, position = self._roll_back(asked, abstract)

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
        clock.reset(first)
        try:
            with self.goodput.during("step"):
                for step in range(first + 1, last + 1):
                    self.watchdog.progress(f"step {step}")
                    try:
                        with self.goodput.during("data"):
                            batch = next(loader)
                    except WaitStopped:
                        self.stopping = self.stop.name
                        self._settle_all(in_flight, pending, clock)
                        self._leave(step - 1, state, position, save=step - 1 > first)
                    clock.waited(loader.last_wait_seconds)
                    before, position = position, loader.state()
                    state, metrics = self._step(step, step_fn, state, self.feed(batch))
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
                    self._pass_point()
                    pausing = step % config.evaluation.every_steps == 0 or step == steps
                    saving = step % config.checkpoint.every_steps == 0
                    if not (pausing or saving or self.stopping is not None):
                        continue
                    self._settle_all(in_flight, pending, clock)
                    pending = None
                    # Evaluated before it is saved: a kill in between repeats both, one after it loses neither.
                    due = pausing and not self._evaluate(step, state)
                    if self.stopping is not None and (step < steps or due):
                        self._leave(step, state, position, due=due)
                    # Within a row of skipped steps there is nothing new to save, and the way back is to stay open.
                    if step == steps or (saving and not self.skips.in_a_row):
                        self._persist(step, state, position)
                    clock.reset(step)
        finally:
            self.console.stop()
            loader.close()
        return state

    def _step(self, step: int, step_fn: Any, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        """One step; done twice and compared where the config asks for it."""
        every = self.config.train.check_every_steps
        if every is None or step % every:
            return step_fn(state, batch)
        with self.goodput.during("check"):
            again = step_fn(copied(state), batch)
        result = step_fn(state, batch)
        with self.goodput.during("check"):
            lines = differences(result, again)
            if anyone_says(bool(lines)):
                where = "; ".join(lines) or "on another process, see its output"
                raise RunFailed(
                    f"step {step} gave two results from one state and batch: {where}. Either a device computes wrongly or "
                    f"this program is not deterministic on it. The checkpoints in {self.directory.checkpoints_path} are from "
                    "before: go on from them on other machines, and test this one (on a GPU, rule the program out with "
                    "XLA_FLAGS=--xla_gpu_deterministic_ops=true)"
                )
        self.console.say(f"step {step} was done twice: bit for bit the same")
        return result

    def compile_step(self, abstract: TrainState) -> Any:
        """The compiled step. It takes exactly these shapes: a recompile is an error, not a delay."""
        started = time.perf_counter()
        self.console.say("compiling the train step ...")
        self.watchdog.progress("the compilation of the train step")
        data = self.config.data
        batch = abstract_batch(self.setup.rules, data.batch_size, data.sequence_length)
        step = jit_train_step(abstract, self.setup.optimizer, self.setup.options)
        with self.goodput.during("compile"):
            task = self._compiling.do(lambda: step.lower(abstract, batch).compile())
            while not task.wait(_POLL_SECONDS):
                self.stopping = self.peers.stop_before_start(self.stop.name)
                if self.stopping is not None:
                    raise self._preempted("while the train step was compiled, with nothing to save")
            compiled = task.result()
        self.book.program_bytes = program_bytes(compiled)
        self.console.say(f"compiled in {time.perf_counter() - started:.1f} s")
        return compiled

    def _restore(self, abstract: TrainState) -> Restored | None:
        """The newest whole checkpoint, if there is one."""
        restored = self.checkpointer.restore_latest(abstract)
        if restored is None:
            return None
        digest, saved = config_hash(self.config), restored.meta["config_hash"]
        if saved != digest:
            raise UserError(
                f"{restored.source} was saved by a run of config {saved}, this one is {digest}; give the config of that run, or "
                "another --run-dir (the folder below checkpoint.durable_path has its name)"
            )
        where = self.directory.checkpoints_path
        if Path(restored.source).parent != where.absolute():
            where = f"{restored.source}, the durable copy: {where} has nothing as new that is whole"
        self.console.say(f"resuming after step {restored.step} from {where}")
        return restored

    def _save(self, step: int, state: TrainState, data: dict[str, Any], due: bool = False) -> None:
        meta = {
            "config_hash": config_hash(self.config),
            "tokens": step * self.setup.tokens_per_step,
            "mesh": self.config.mesh.shape(),
            "versions": {"jax": jax.__version__},
            "evaluation_due": due,
            **self.course.meta(),
        }
        last = step == self.config.train.steps or self.stopping is not None
        save = functools.partial(self.checkpointer.save, step, state, data=data, meta=meta, durable=last)
        # First the outcome of the save before this one, so that its failure does not cost this one as well.
        for call in (self.checkpointer.wait, save):
            try:
                call()
            except CheckpointError as error:
                # A full disk costs a checkpoint, not the run; the last one must be on the disk.
                self.book.raise_alarm("checkpoint_failures")
                self._saving = False
                if last:
                    raise
                self.console.say(f"warning: {error}")
            else:
                if self._saving and call is not save:
                    self.book.alarms.pop("alarm/checkpoint_failures", None)
                self._saving = call is save
        note_durable(self.checkpointer.durable_state, self.book.alarms)

    def _persist(self, step: int, state: TrainState, data: dict[str, Any], due: bool = False) -> None:
        """Save. The last save of a process is waited for, and tried again before the run fails for it."""
        self.watchdog.progress(f"the checkpoint of step {step}")
        last = step == self.config.train.steps or self.stopping is not None
        with self.goodput.during("checkpoint"):
            for pause in (*SAVE_RETRY_SECONDS, None):
                failure = None
                try:
                    self._save(step, state, data, due)
                    if last:
                        self.checkpointer.wait()
                except CheckpointError as error:
                    failure = error
                if not last or not anyone_says(failure is not None):
                    return
                failure = failure or "another process could not write its part, see its output"
                if pause is None:
                    raise RunFailed(
                        f"step {step} could not be saved in {1 + len(SAVE_RETRY_SECONDS)} attempts, and the process ends here: "
                        f"{failure}. The same command goes on from the newest checkpoint in {self.directory.checkpoints_path}"
                    )
                self.console.say(f"warning: {failure}; trying again in {pause:g} s")
                time.sleep(pause)

    def _roll_back(self, asked: RollBack, abstract: TrainState) -> tuple[TrainState, int, Any]:
        """(state, step, position in the data) to go on from after too many skipped steps."""
        self.watchdog.progress(f"the rollback from step {asked.last}")
        guard, last, first = self.config.train.guard, asked.last, asked.first
        what = f"steps {first} to {last} were skipped, {guard.max_consecutive_skips} in a row"
        if len(self.course.rollbacks) >= guard.max_rollbacks:
            raise RunFailed(f"{what}, after {guard.max_rollbacks} rollbacks (train.guard.max_rollbacks). {self.skips.advice}")
        with self.goodput.during("startup"):
            with contextlib.suppress(CheckpointError):
                self.checkpointer.wait()
            to = first_says(way_back(self.checkpointer.steps(), first, self.config.checkpoint.every_steps))
            try:
                if to >= 0:
                    state = self.checkpointer.restore(abstract, step=to).state
                elif self.course.from_seed:
                    to = 0
                    state = create_state(self.setup.specs, self.setup.optimizer, self.setup.rules, self.config.train.seed)
                else:
                    raise RunFailed(f"{what}, and no checkpoint from before them is left to go back to. {self.skips.advice}")
                self.checkpointer.discard_after(to)
            except CheckpointError as error:
                raise RunFailed(f"{what}, and the way back failed: {error}. {self.skips.advice}") from error
        self.course = self.course.back(asked, to)
        self.sinks.rewind(to, {"from_step": last, "first_skipped": first})
        if self.peers.index == 0:
            with self.book.tolerating("samples"):
                truncate_rows(self.directory.samples_path, to)
        self.goodput.rolled_back(last, to)
        self.console.say(f"{what}: going back to step {to}, and on with the data behind step {last}")
        return state, to, asked.position

    def _settle(self, flight: Flight) -> None:
        self.goodput.stepped(skipped=self.skips.settle(flight))

    def _settle_all(self, in_flight: collections.deque[Flight], pending: Flight | None, clock: Clock) -> None:
        """Wait for every step that was started, and log the last if it is to be."""
        if pending is not None:
            self.book.log(pending, clock, self.sinks)
        while in_flight:
            self._settle(in_flight.popleft())

    def _pass_point(self) -> None:
        """Where all processes come by in the same order, and so may agree to stop."""
        self.stopping = self.stopping or self.peers.stop_after(next(self._points), self.stop.name)

    def _evaluate(self, step: int, state: TrainState) -> bool:
        """Whether it was done; not where the run is to stop before it, or stops in it."""
        if self.stopping is not None:
            return False
        what = f"the evaluation after step {step}"
        self.watchdog.progress(what)
        try:
            with self.goodput.during("compile"):
                self._finish_compiling(self.compile_evaluation())
            with self.goodput.during("evaluation"):
                result = self.evaluator(state.model, functools.partial(self._between_batches, what))
        except _StoppedEarly:
            return False
        if result is None:
            return True
        self.sinks.log(step, result.metrics())
        self.console.say(
            f"step {step}: held-out loss {result.loss:.3f}, {result.bits_per_byte:.3f} bits per byte "
            f"({result.tokens:,} tokens, {self.evaluator.num_bytes:,} bytes)"
        )
        if self.config.sample.at_evaluations and step < self.config.train.steps:
            self._sample(step, state)
        return True

    def _finish_compiling(self, task: Task) -> None:
        while not task.wait(_POLL_SECONDS):
            if self.peers.count == 1:
                self._stop_early()
        task.result()

    def _between_batches(self, what: str) -> None:
        self.watchdog.progress(what)
        self._stop_early()

    def _stop_early(self) -> None:
        self._pass_point()
        if self.stopping is not None:
            raise _StoppedEarly

    def _sample(self, step: int, state: TrainState) -> None:
        sample = self.config.sample
        if sample.tokens == 0 or first_says(step in sampled_steps(self.directory.samples_path)):
            return
        self.watchdog.progress(f"the sample after step {step}")
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), step)
        options = {"tokens": sample.tokens, "temperature": sample.temperature, "key": key}
        with self.goodput.during("evaluation"):
            text = draw_text(self.config, state.model, self.setup.rules, sample.prompt, **options)
        if self.peers.index == 0:
            with self.book.tolerating("the sample"), self.directory.samples_path.open("a") as file:
                file.write(json.dumps({"step": step, "prompt": sample.prompt, "text": text}) + "\n")
        self.console.say(f"--- sample after {step} steps ---\n{sample.prompt}{text}\n---")

    def _leave(self, step: int, state: TrainState, data: dict[str, Any], *, due: bool = False, save: bool = True) -> None:
        """Save what there is and end, as asked."""
        if save:
            self._persist(step, state, data, due)
        self.goodput.note(step)
        where = f"saved step {step} in {self.directory.checkpoints_path}" if save else f"step {step} was saved before"
        raise self._preempted(where if step else "before step 1, with nothing to save")

    def _preempted(self, what: str) -> Preempted:
        return Preempted(f"{self.stopping}: {what}; the same command resumes")

    def _finish(self, state: TrainState) -> None:
        self._sample(self.config.train.steps, state)
        self.watchdog.progress("the end of the run")
        self.checkpointer.wait()
        self.goodput.note(self.config.train.steps)
        if self.peers.index == 0:
            say_what_next(self.directory, self.console)
