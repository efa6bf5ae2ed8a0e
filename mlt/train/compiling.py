"""Compilation beside the main thread: the train step before the first step, the evaluation while steps run."""

import functools
import time
from typing import Any

from mlt.train.background import Task, Worker
from mlt.train.clusters import cluster_fields
from mlt.train.evaluate import Evaluator
from mlt.train.neighbours import neighbour_fields
from mlt.train.services import Services
from mlt.train.state import TrainState, abstract_batch
from mlt.train.step import jit_train_step
from mlt.train.throughput import program_bytes


class Compiler:
    """Compiles a run's programs in a thread of its own, one after the other."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._worker = Worker("mlt-compile")

    def step(self, abstract: TrainState) -> Any:
        """The compiled step. It takes exactly these shapes: a recompile is an error, not a delay.

        Raises:
            Preempted: asked to stop.
        """
        services, setup, data = self._services, self._services.setup, self._services.config.data
        started = time.perf_counter()
        services.console.say("compiling the train step ...")
        services.watchdog.progress("the compilation of the train step")
        fields = {**cluster_fields(setup.config), **neighbour_fields(setup.config), **setup.hashes.fields()}
        batch = abstract_batch(setup.rules, data.batch_size, data.sequence_length, fields)
        step = jit_train_step(abstract, setup.optimizer, setup.options)
        with services.goodput.during("compile"):
            task = self._worker.do(lambda: step.lower(abstract, batch).compile())
            if not services.stopping.wait_before_start(task):
                raise services.stopping.preempted("while the train step was compiled, with nothing to save")
            compiled = task.result()
        services.book.program_bytes = program_bytes(compiled)
        services.console.say(f"compiled in {time.perf_counter() - started:.1f} s")
        return compiled

    def evaluation(self, evaluator: Evaluator, abstract: TrainState) -> Task:
        """Begin to compile the evaluation."""
        return self._worker.do(functools.partial(evaluator.compile, abstract.model))
