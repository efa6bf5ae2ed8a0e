"""What a logged step says, and the alarms that it repeats while they last."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator

import jax

from mlt.report.console import RunConsole
from mlt.report.sinks import MetricSinks
from mlt.train.clock import Clock
from mlt.train.goodput import Goodput
from mlt.train.setup import Setup
from mlt.train.skips import Flight
from mlt.train.throughput import Utilization, memory_metrics


class Logbook:
    """Makes the rows of a run's metrics.

    Attributes:
        alarms: name -> value of what every row repeats, such as `alarm/checkpoint_failures`.
        program_bytes: memory of the compiled step, once it is known.
    """

    def __init__(self, setup: Setup, console: RunConsole, goodput: Goodput) -> None:
        self._setup, self._console, self._goodput = setup, console, goodput
        self._utilization = Utilization(setup.config, device_kind=jax.devices()[0].device_kind, num_devices=jax.device_count())
        self.alarms: dict[str, int] = {}
        self.program_bytes: int | None = None

    def log(self, flight: Flight, clock: Clock, sinks: MetricSinks) -> None:
        """Wait for a step, and give what it says to the sinks and the console."""
        step, setup = flight.step, self._setup
        told = {name: float(value) for name, value in jax.device_get(dict(flight.metrics)).items()}
        values = {name: value for name, value in told.items() if not name.startswith("guard/")}
        values |= clock.read(step)
        values["train/tokens"] = step * setup.tokens_per_step
        # A skipped step does not move the schedule.
        moved = step - 1 - int(told["guard/skipped_steps"] - told["guard/skipped"])
        values["train/learning_rate"] = float(self._schedule(moved))
        values["guard/skipped_steps"] = told["guard/skipped_steps"]
        values |= self._utilization.metrics(values["throughput/tokens_per_second"], flight.batch["segment_ids"])
        values["throughput/goodput"] = self._goodput.note(step)
        values |= memory_metrics(self.program_bytes)
        values |= self.alarms | ({"alarm/sinks_failing": sinks.failing} if sinks.failing else {})
        sinks.log(step, values)
        # What is off from a teacher is no text's cost.
        is_cost = setup.options.teacher is None or not setup.options.teacher.distill.listens
        targets_per_byte = setup.targets_per_byte((step - 1) * setup.config.data.batch_size)
        bits_per_byte = values["train/loss"] / math.log(2) * targets_per_byte if is_cost else None
        self._console.logged(step, values, bits_per_byte)

    def raise_alarm(self, name: str) -> None:
        """Count one more of a kind of failure."""
        self.alarms[f"alarm/{name}"] = self.alarms.get(f"alarm/{name}", 0) + 1

    @contextlib.contextmanager
    def tolerating(self, what: str) -> Iterator[None]:
        """A file that cannot be written costs a line on the screen and an alarm, not the run."""
        try:
            yield
        except OSError as error:
            self.raise_alarm("write_failures")
            self._console.say(f"warning: {what} not written: {error}; training goes on. Free space, or make it writable")

    @functools.cached_property
    def _schedule(self) -> Callable[[int], float]:
        config = self._setup.config
        return config.schedule.build(config.optimizer.learning_rate, config.train.steps)
