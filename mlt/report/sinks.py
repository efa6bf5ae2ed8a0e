"""Where metrics go: always to metrics.jsonl, on request elsewhere as well. No sink ever stops a training."""

import collections
import io
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import jax

from mlt.config.base import Config
from mlt.config.problems import Problem
from mlt.report.profile import ProfileConfig
from mlt.report.wandb_sink import WandbConfig, WandbSink
from mlt.run_paths import RunPaths, replacing

LOGGER = logging.getLogger("mlt.report")
RETRY_SECONDS = 60.0  # from a sink's failure to the next try
_HELD_BACK = 10_000  # calls kept for a sink that fails


class LogConfig(Config):
    """What is logged and where to.

    Attributes:
        every_steps: interval of the training metrics; the first and the last step are always logged.
        wandb: also log to Weights & Biases; None does not import it.
        profile: trace a few steps with JAX's profiler; None traces nothing.
    """

    every_steps: int = 10
    wandb: WandbConfig | None = None
    profile: ProfileConfig | None = None

    def problems(self) -> Iterator[Problem]:
        if self.every_steps < 1:
            yield Problem("every_steps", self.every_steps, "must be at least 1")


class MetricSink(Protocol):
    """One place that metrics go to. It may raise: `MetricSinks` answers for that."""

    def start(self, step: int, facts: Mapping[str, Any]) -> None:
        """Note that a process starts or resumes after `step`, and what it runs on."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of one step."""

    def rewind(self, step: int, facts: Mapping[str, Any]) -> None:
        """Note that the run went back to `step`: what was logged of later steps is not part of it."""

    def close(self) -> None:
        """Write out what is held back."""


class JsonLinesSink:
    """One JSON object a line: {"step": 10, "time": 1.7e9, "train/loss": 3.2, ...}; written out line by line.

    A start is a row with "kind": "start" and its facts. JSON has no NaN and no infinity: such a value is null, and the
    row says which it was: "nonfinite": {"train/loss": "nan"}.
    """

    def __init__(self, path: Path) -> None:
        """Append to a file, after the last whole line of it."""
        self.path = path
        self._file: io.FileIO | None = None
        self._torn = path.exists() and not _ends_with_newline(path)

    def start(self, step: int, facts: Mapping[str, Any]) -> None:
        self.append({"kind": "start", "step": step, "time": time.time(), **facts})

    def rewind(self, step: int, facts: Mapping[str, Any]) -> None:
        self.truncate_after(step)
        self.append({"kind": "rollback", "step": step, "time": time.time(), **facts})

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        row: dict[str, Any] = {"step": step, "time": time.time()}
        nonfinite = {}
        for name, value in metrics.items():
            number = value if isinstance(value, int) else float(value)
            row[name] = number if math.isfinite(number) else None
            if row[name] is None:
                nonfinite[name] = str(number)
        self.append(row | ({"nonfinite": nonfinite} if nonfinite else {}))

    def truncate_after(self, step: int) -> None:
        """Drop the rows of later steps, and torn ones; see `truncate_rows`."""
        self.close()
        truncate_rows(self.path, step)
        self._torn = False

    def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def append(self, row: Mapping[str, Any]) -> None:
        """Write any row.

        Raises:
          OSError: it is not written, or not whole; the next one starts on a line of its own.
        """
        line = json.dumps(row, allow_nan=False) + "\n"
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Without a buffer: what a full disk refuses must not be written once more when the file is closed.
            self._file = self.path.open("ab", buffering=0)
        if self._torn:  # a crash or a full disk cut the last line off: it must not swallow this one
            line = "\n" + line
        self._torn = True
        data = line.encode()
        while data:
            data = data[self._file.write(data) :]
        self._torn = False


class Tolerant:
    """A place to write to that may fail: switched off with one warning, tried again at intervals, then given what it missed."""

    def __init__(self, target: Any, name: str, now: Callable[[], float] = time.monotonic) -> None:
        """Take anything with methods, and what to call it in a warning."""
        self.target, self._name, self._now = target, name, now
        self._calls: collections.deque[Callable[[Any], None]] = collections.deque(maxlen=_HELD_BACK)
        self._retry_at: float | None = None

    @property
    def failing(self) -> bool:
        """Whether it is switched off."""
        return self._retry_at is not None

    def __call__(self, call: Callable[[Any], None], *, now: bool = False) -> None:
        """Make a call on the target, after those it missed; `now` does not wait for the next try."""
        self._calls.append(call)
        if self._retry_at is not None and not now and self._now() < self._retry_at:
            return
        held_back = len(self._calls) - 1
        try:
            while self._calls:
                self._calls[0](self.target)
                self._calls.popleft()
        except Exception as error:
            if self._retry_at is None:
                LOGGER.warning(
                    "%s: %s: %s; training goes on, and this is tried again every %g s. Free space, or make it writable",
                    self._name,
                    type(error).__name__,
                    error,
                    RETRY_SECONDS,
                )
            self._retry_at = self._now() + RETRY_SECONDS
        else:
            if self._retry_at is not None:
                LOGGER.warning("%s: works again; %d rows were held back and are written now", self._name, held_back)
            self._retry_at = None


def tolerant_rows(path: Path) -> Callable[[Mapping[str, Any]], None]:
    """Give a function that appends rows to a JSON Lines file, or holds them back while that fails; see `Tolerant`."""
    rows = Tolerant(JsonLinesSink(path), str(path))
    return lambda row: rows(lambda sink: sink.append(row))


class MetricSinks:
    """All sinks of a run as one. A failure of one is reported, the training goes on; see `Tolerant`."""

    def __init__(self, sinks: Sequence[MetricSink], first_step: int = 0) -> None:
        """Take sinks; `first_step` is the step that this process starts or resumes after."""
        self._sinks = [Tolerant(sink, type(sink).__name__) for sink in sinks]
        self._first_step = first_step

    @property
    def failing(self) -> int:
        """How many sinks are switched off now."""
        return sum(sink.failing for sink in self._sinks)

    def start(self, facts: Mapping[str, Any]) -> None:
        """Note that a process starts or resumes here, and what it runs on."""
        for sink in self._sinks:
            sink(lambda target: target.start(self._first_step, facts))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Give the metrics of one step to every sink."""
        for sink in self._sinks:
            sink(lambda target: target.log(step, metrics))

    def rewind(self, step: int, facts: Mapping[str, Any]) -> None:
        """Tell every sink that the run went back to `step`."""
        for sink in self._sinks:
            sink(lambda target: target.rewind(step, facts))

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink(lambda target: target.close(), now=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_sinks(config: LogConfig, paths: RunPaths, first_step: int) -> MetricSinks:
    """Open the sinks of a run that starts or resumes after `first_step`; what the files hold of later steps is dropped.

    In a run of several processes only the first has any.
    """
    if jax.process_index() != 0:
        return MetricSinks([], first_step)
    sinks: list[MetricSink] = []
    try:
        rows = JsonLinesSink(paths.metrics_path)
        sinks.append(rows)
        rows.truncate_after(first_step)
        truncate_rows(paths.samples_path, first_step)
    except OSError as error:
        LOGGER.warning("cannot cut %s back to step %d: %s", paths.metrics_path, first_step, error.strerror)
    if config.wandb is not None:
        try:
            sinks.append(WandbSink(config.wandb, paths))
        except Exception as error:
            LOGGER.warning("wandb is not used: %s: %s; training goes on", type(error).__name__, error)
    return MetricSinks(sinks, first_step)


def truncate_rows(path: Path, step: int) -> None:
    """Drop the rows of steps after `step` from a JSON Lines file, and lines that are no rows, such as a torn last one.

    The file is replaced whole; where there is nothing to drop, or no file, nothing is written.

    Raises:
      OSError: it cannot be read or replaced.
    """
    if not path.exists() or all(_keeps(line, step) for line in _lines(path)):
        return
    with replacing(path) as file:
        file.writelines(line for line in _lines(path) if _keeps(line, step))


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from file


def _keeps(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, 2) == 0:
            return True
        file.seek(-1, 2)
        return file.read(1) == b"\n"
