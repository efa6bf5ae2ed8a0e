"""The training loop: feed, step, log, evaluate, save; resume what the run directory holds."""

import collections
import concurrent.futures
import functools
import importlib.metadata
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import jax

from mlt.checkpoint.layout import CheckpointError
from mlt.checkpoint.restore import Restored
from mlt.checkpoint.save import Checkpointer
from mlt.config.check import check_run
from mlt.config.dump import config_hash, diff, from_yaml, to_yaml
from mlt.config.run import RunConfig
from mlt.data.loader import Loader, open_loader
from mlt.errors import Preempted, RunFailed, UserError
from mlt.parallel.devices import split_axes
from mlt.plan.text import plan_text
from mlt.report.console import RunConsole, open_console
from mlt.report.page import write_report
from mlt.report.sinks import open_sinks
from mlt.train.clock import Clock
from mlt.train.distributed import agree_on, first_says, joined, meet
from mlt.train.evaluate import Evaluator
from mlt.train.peers import ALONE, Alone
from mlt.train.processes import Processes
from mlt.train.run_directory import RunDirectory
from mlt.train.sample import draw_text
from mlt.train.setup import Setup, prepare
from mlt.train.signals import StopRequest
from mlt.train.state import TrainState, abstract_batch, abstract_state, create_state
from mlt.train.step import jit_train_step
from mlt.train.watchdog import Watchdog

STEPS_IN_FLIGHT = 2


def train(config: RunConfig, run_dir: Path, processes: Processes | None = None) -> None:
    """Start a run, or resume what `run_dir` holds.

    Args:
        config: what to train.
        run_dir: where the run lives; the same directory for all its processes.
        processes: this process's place among those of the run; None where it is the only one.

    Raises:
        UserError: the config, data, mesh or directory is wrong; nothing has been written then.
        Preempted: a signal asked to stop; the state is saved.
        PeerLost: another process died.
    """
    check_run(config)
    with joined(processes, config) as peers:
        rules = config.mesh.rules()
        directory = RunDirectory(run_dir)
        with StopRequest() as stop, directory.lock():
            directory.check_config(to_yaml(config), lambda old, new: diff(from_yaml(old), from_yaml(new)))
            meet("run directory")
            log_path = directory.process_log_path(peers.index)
            console = open_console(config.train.steps, process=peers.index, log_path=log_path)
            setup = prepare(config, rules)
            console.say(setup.corpus.describe())
            agree_on("the corpus", setup.corpus.hash)
            Loop(setup, directory, console, stop, peers).run()


class Loop:
    """One process's part in a run."""

    def __init__(self, setup: Setup, directory: RunDirectory, console: RunConsole, stop: StopRequest, peers: Alone = ALONE):
        self.setup, self.config = setup, setup.config
        self.directory, self.console, self.stop, self.peers = directory, console, stop, peers
        self.evaluator = Evaluator(setup)
        self.feed = self.evaluator.feed

    def run(self) -> None:
        abstract = abstract_state(self.setup.specs, self.setup.optimizer, self.setup.rules)
        plan = plan_text(self.config, self.setup.specs)
        self.directory.write_config(to_yaml(self.config))
        if self.peers.index == 0:
            self.directory.plan_path.write_text(plan)
        self.console.say(plan)
        mesh = self.setup.rules.mesh
        if self.peers.count > 1 and isinstance(mesh, jax.sharding.Mesh):
            crossing = ", ".join(split_axes(mesh.devices, mesh.axis_names))
            self.console.say(f"processes    {self.peers.count}; between machines: {crossing}")
        with Checkpointer(self.directory.checkpoints_path, keep=self.config.checkpoint.keep) as checkpointer:
            self.checkpointer = checkpointer
            self._train(self._restore(abstract), abstract)

    def _train(self, restored: Restored | None, abstract: TrainState) -> None:
        steps = self.config.train.steps
        first = 0 if restored is None else restored.step
        if restored is not None and first == steps:
            self.console.say(f"this run is complete: {steps} steps")
            self._finish(restored.state)
            return
        with concurrent.futures.ThreadPoolExecutor(1) as pool, open_sinks(self.config.log, self.directory, first) as sinks:
            self.sinks = sinks
            sinks.start(self._facts(first))
            step_fn = self.compile_step(abstract)
            self.compile_evaluation = functools.cache(lambda: pool.submit(self.evaluator.compile, abstract.model))
            if restored is None:
                state = create_state(self.setup.specs, self.setup.optimizer, self.setup.rules, self.config.train.seed)
            else:
                state = restored.state
            # A new run has read no data yet, nor has an imported model.
            position = None if restored is None else restored.data or None
            loader = open_loader(self.config.data, self.setup.corpus, state=position, places=self.feed.places)
            self._finish(self.steps(step_fn, state, first, steps, loader))

    def steps(self, step_fn: Any, state: TrainState, first: int, last: int, loader: Loader) -> TrainState:
        """Steps first + 1 to last with everything around them; leaves with `Preempted` when asked to stop."""
        stacks_path, limit = self.directory.stacks_path(self.peers.index), self.config.train.hang_timeout_seconds
        with Watchdog(limit, stacks_path, tell=self.peers.leave) as self.watchdog:
            return self._steps(step_fn, state, first, last, loader)

    def _steps(self, step_fn: Any, state: TrainState, first: int, last: int, loader: Loader) -> TrainState:
        config, steps = self.config, self.config.train.steps
        clock = Clock(self.setup.tokens_per_step)
        in_flight: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
        pending: tuple[int, dict[str, jax.Array]] | None = None
        self.console.start(first)
        clock.reset(first)
        try:
            for step in range(first + 1, last + 1):
                self.watchdog.progress(f"step {step}")
                batch = next(loader)
                clock.waited(loader.last_wait_seconds)
                state, metrics = step_fn(state, self.feed(batch))
                # The device works on this step while the host logs the one before.
                if pending is not None:
                    self._log(*pending, clock)
                    pending = None
                    # Beside the steps, but not before the first loss is on the screen.
                    self.compile_evaluation()
                in_flight.append((step, metrics))
                if len(in_flight) > STEPS_IN_FLIGHT:
                    self._check_finite(*in_flight.popleft())
                if step % config.log.every_steps == 0 or step in (1, steps):
                    pending = (step, metrics)
                self.stopping = self.peers.stop_after(step, self.stop.name)
                pausing = step % config.evaluation.every_steps == 0 or step == steps
                saving = step % config.checkpoint.every_steps == 0 or step == steps or self.stopping is not None
                if (pausing or saving) and pending is not None:
                    self._log(*pending, clock)
                    pending = None
                while (pausing or saving) and in_flight:
                    self._check_finite(*in_flight.popleft())
                # Evaluated before it is saved: a kill in between repeats both, one after it loses neither.
                if pausing:
                    self.watchdog.progress(f"the evaluation after step {step}")
                    self._evaluate(step, state)
                if saving:
                    self.watchdog.progress(f"the checkpoint of step {step}")
                    self._save(step, state, loader.state())
                if self.stopping is not None and step < steps:
                    self._leave(step)
                if pausing or saving:
                    clock.reset(step)
        finally:
            self.console.stop()
            loader.close()
        return state

    def compile_step(self, abstract: TrainState) -> Any:
        """The compiled step. It takes exactly these shapes: a recompile is an error, not a delay."""
        started = time.perf_counter()
        self.console.say("compiling the train step ...")
        data = self.config.data
        batch = abstract_batch(self.setup.rules, data.batch_size, data.sequence_length)
        compiled = jit_train_step(abstract, self.setup.optimizer, self.setup.options).lower(abstract, batch).compile()
        self.console.say(f"compiled in {time.perf_counter() - started:.1f} s")
        return compiled

    def _restore(self, abstract: TrainState) -> Restored | None:
        """The newest whole checkpoint, if there is one."""
        restored = self.checkpointer.restore_latest(abstract)
        if restored is None:
            return None
        digest, saved = config_hash(self.config), restored.meta["config_hash"]
        if saved != digest:
            raise UserError(f"{self.directory.checkpoints_path} was saved by config {saved}, this one is {digest}")
        self.console.say(f"resuming after step {restored.step} from {self.directory.checkpoints_path}")
        return restored

    def _save(self, step: int, state: TrainState, data: dict[str, Any]) -> None:
        meta = {
            "config_hash": config_hash(self.config),
            "tokens": step * self.setup.tokens_per_step,
            "mesh": self.config.mesh.shape(),
            "versions": {"jax": jax.__version__},
        }
        try:
            self.checkpointer.save(step, state, data=data, meta=meta)
        except CheckpointError as error:
            # A full disk costs this checkpoint, not the run; the last one must be on the disk.
            if step == self.config.train.steps or self.stopping is not None:
                raise
            self.console.say(f"warning: {error}")

    def _log(self, step: int, metrics: dict[str, jax.Array], clock: Clock) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        values |= clock.read(step)
        values["train/tokens"] = step * self.setup.tokens_per_step
        values["train/learning_rate"] = float(self._schedule(step - 1))
        self.sinks.log(step, values)
        self.console.logged(step, values, values["train/loss"] / math.log(2) * self.setup.tokens_per_byte)

    def _check_finite(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Wait for a step, and stop the run at the first loss or gradient that is not finite: no such state is saved."""
        for name in ("train/loss", "train/grad_norm"):
            value = float(metrics[name])
            if not math.isfinite(value):
                raise RunFailed(
                    f"{name} is {value} at step {step}; the checkpoints in {self.directory.checkpoints_path} are from before. "
                    "Lower optimizer.learning_rate or train.clip_norm, and start a new run"
                )

    @functools.cached_property
    def _schedule(self) -> Any:
        return self.config.schedule.build(self.config.optimizer.learning_rate, self.config.train.steps)

    def _evaluate(self, step: int, state: TrainState) -> None:
        self.compile_evaluation().result()
        result = self.evaluator(state.model)
        if result is None:
            return
        self.sinks.log(step, result.metrics())
        self.console.say(
            f"step {step}: held-out loss {result.loss:.3f}, {result.bits_per_byte:.3f} bits per byte "
            f"({result.tokens:,} tokens, {self.evaluator.num_bytes:,} bytes)"
        )
        if self.config.sample.at_evaluations and step < self.config.train.steps:
            self._sample(step, state)

    def _sample(self, step: int, state: TrainState) -> None:
        sample = self.config.sample
        if sample.tokens == 0 or first_says(step in self._sampled_steps()):
            return
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), step)
        options = {"tokens": sample.tokens, "temperature": sample.temperature, "key": key}
        text = draw_text(self.config, state.model, self.setup.rules, sample.prompt, **options)
        if self.peers.index == 0:
            with self.directory.samples_path.open("a") as file:
                file.write(json.dumps({"step": step, "prompt": sample.prompt, "text": text}) + "\n")
        self.console.say(f"--- sample after {step} steps ---\n{sample.prompt}{text}\n---")

    def _sampled_steps(self) -> set[int]:
        path = self.directory.samples_path
        return {json.loads(line)["step"] for line in path.read_text().splitlines()} if path.exists() else set()

    def _leave(self, step: int) -> None:
        self.checkpointer.wait()
        raise Preempted(f"{self.stopping}: saved step {step} in {self.directory.checkpoints_path}; the same command resumes")

    def _finish(self, state: TrainState) -> None:
        self._sample(self.config.train.steps, state)
        self.checkpointer.wait()
        if self.peers.index != 0:
            return
        try:
            write_report(self.directory.path)
        except UserError as error:
            self.console.say(f"warning: {error}")
        run = self.directory.path
        self.console.say(
            f"checkpoints: {self.directory.checkpoints_path}\nreport: {self.directory.report_path}\nnext:\n"
            f'  mlt generate {run} --prompt "import "    more text\n'
            f"  mlt verify {run}    isolation, causality, decoding and gradients of this model\n"
            f"  mlt export {run} --to {run}/export    weights, config and tokenizer\n"
        )

    def _facts(self, first: int) -> dict[str, Any]:
        """What the report says about where and from what a run started."""
        device = jax.devices()[0]
        return {
            "first_step": first,
            "steps": self.config.train.steps,
            "config_hash": config_hash(self.config),
            "corpus": self.setup.corpus.hash,
            "corpus_bytes": self.setup.corpus.bytes_read,
            **{name: importlib.metadata.version(name) for name in ("mlt", "jax", "flax", "optax", "orbax-checkpoint")},
            "python": platform.python_version(),
            "system": platform.platform(),
            "device": device.device_kind,
            "num_devices": jax.device_count(),
            "num_processes": self.peers.count,
        }
