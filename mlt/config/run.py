"""RunConfig: the whole description of a run, one section per part."""

from collections.abc import Iterator
from typing import Literal

from mlt.config.base import Config
from mlt.config.problems import Problem
from mlt.data.loader import DataConfig
from mlt.model.lm import LMConfig
from mlt.model.remat import Remat
from mlt.optim.adamw import AdamW
from mlt.optim.base import OptimizerConfig
from mlt.optim.schedule import Schedule, WarmupCosine
from mlt.parallel.mesh import Layout
from mlt.report.sinks import LogConfig


class TrainConfig(Config):
    """How long and how to step.

    Attributes:
        steps: optimizer steps in all.
        grad_accumulation: micro-batches per step; divides the batch.
        compute_dtype: type of activations and matrix products; parameters and reductions stay float32.
        clip_norm: global gradient norm above which gradients are scaled down; None never clips.
        z_loss: weight of the squared log-partition in the loss.
        seed: of initialization and samples.
        start_timeout_seconds: how long the processes of a run wait for each other to start.
        peer_timeout_seconds: silence after which a process counts as lost; the others then end.
        hang_timeout_seconds: how long a step, an evaluation or a save may take before the run ends; None never ends it.
    """

    steps: int
    grad_accumulation: int = 1
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    clip_norm: float | None = 1.0
    z_loss: float = 0.0
    seed: int = 0
    start_timeout_seconds: float = 300.0
    peer_timeout_seconds: float = 300.0
    hang_timeout_seconds: float | None = 1800.0

    def problems(self) -> Iterator[Problem]:
        for name in ("steps", "grad_accumulation"):
            if getattr(self, name) < 1:
                yield Problem(name, getattr(self, name), "must be at least 1")
        if self.clip_norm is not None and self.clip_norm <= 0:
            yield Problem("clip_norm", self.clip_norm, "must be positive", "use None to never clip")
        if self.z_loss < 0:
            yield Problem("z_loss", self.z_loss, "must not be negative")
        if not 0 <= self.seed < 2**32:
            yield Problem("seed", self.seed, "must lie in [0, 2^32)")
        for name in ("start_timeout_seconds", "peer_timeout_seconds", "hang_timeout_seconds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield Problem(name, value, "must be at least 1")


class CheckpointConfig(Config):
    """When to save and what to keep.

    Attributes:
        every_steps: interval; the last step is always saved.
        keep: newest checkpoints kept.
    """

    every_steps: int = 500
    keep: int = 3

    def problems(self) -> Iterator[Problem]:
        for name in ("every_steps", "keep"):
            if getattr(self, name) < 1:
                yield Problem(name, getattr(self, name), "must be at least 1")


class EvalConfig(Config):
    """Loss on held-out documents.

    Attributes:
        every_steps: interval; the last step is always evaluated.
        max_rows: rows of the held-out split to read; None reads all of it.
    """

    every_steps: int = 500
    max_rows: int | None = None

    def problems(self) -> Iterator[Problem]:
        if self.every_steps < 1:
            yield Problem("every_steps", self.every_steps, "must be at least 1")
        if self.max_rows is not None and self.max_rows < 1:
            yield Problem("max_rows", self.max_rows, "must be at least 1", "use None to read the whole split")


class SampleConfig(Config):
    """Text drawn from the model at the end of a run, and at every evaluation if asked.

    Attributes:
        prompt: what the model continues.
        tokens: how many to draw; 0 draws none.
        temperature: of the softmax; 0 takes the most likely token.
        at_evaluations: also draw at every evaluation.
    """

    prompt: str = ""
    tokens: int = 128
    temperature: float = 0.8
    at_evaluations: bool = False

    def problems(self) -> Iterator[Problem]:
        if self.tokens < 0:
            yield Problem("tokens", self.tokens, "must not be negative")
        if self.temperature < 0:
            yield Problem("temperature", self.temperature, "must not be negative")


class RunConfig(Config):
    """A run: what is trained, on what, how, and where its pieces lie."""

    model: LMConfig
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig = AdamW(learning_rate=3e-4)
    schedule: Schedule = WarmupCosine(warmup_steps=100)
    mesh: Layout = Layout()
    remat: Remat = Remat()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvalConfig = EvalConfig()
    sample: SampleConfig = SampleConfig()
    log: LogConfig = LogConfig()
