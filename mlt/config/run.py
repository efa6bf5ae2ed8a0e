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
from mlt.train.distill import Distill
from mlt.train.guard import GuardConfig


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
        hang_timeout_seconds: how long a step, an evaluation, a save, a compilation or a wait for data may take before the
            run ends; None never ends it.
        check_memory: refuse a train state that takes more of a device than there is, before anything is made. What has to fit
            beside it, activations and gradients, is not counted.
        check_every_steps: at every so many steps, do the step twice and compare the results bit for bit; None never does.
        guard: what is done about a loss or gradient that is not finite, or a spike.
        distill: the run whose model this one learns from; None learns from the data alone.
        neighbour_weight: share of KL(p_kNN | p) in the loss, p_kNN being that of `data.neighbours`; None where there is none.
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
    check_memory: bool = True
    check_every_steps: int | None = None
    guard: GuardConfig = GuardConfig()
    distill: Distill | None = None
    neighbour_weight: float | None = None

    def problems(self) -> Iterator[Problem]:
        for name in ("steps", "grad_accumulation"):
            if getattr(self, name) < 1:
                yield Problem(name, getattr(self, name), "must be at least 1")
        if self.clip_norm is not None and self.clip_norm <= 0:
            yield Problem("clip_norm", self.clip_norm, "must be positive", "use None to never clip")
        if self.z_loss < 0:
            yield Problem("z_loss", self.z_loss, "must not be negative")
        if self.neighbour_weight is not None and not 0 < self.neighbour_weight <= 1:
            yield Problem("neighbour_weight", self.neighbour_weight, "must lie in (0, 1]", "None trains on the data alone")
        if not 0 <= self.seed < 2**32:
            yield Problem("seed", self.seed, "must lie in [0, 2^32)")
        for name in ("start_timeout_seconds", "peer_timeout_seconds", "hang_timeout_seconds", "check_every_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield Problem(name, value, "must be at least 1")


class CheckpointConfig(Config):
    """When to save, where to, and what to keep (docs/checkpoints.md).

    Attributes:
        every_steps: interval; the last step is always saved.
        keep: newest checkpoints kept in the run directory.
        keep_every_steps: checkpoints of steps divisible by this stay there for good; None has no such steps.
        durable_path: a directory or an object store (gs://bucket/path, s3://bucket/path) that outlives the machine; copies
            go to a folder there with the name of the run directory. None makes no copies.
        durable_every_steps: checkpoints of steps divisible by this are copied, and the last one of every process; None
            copies all.
        durable_keep: newest copies kept.
        durable_keep_every_steps: copies of steps divisible by this stay for good; None has no such steps.
        durable_wait_seconds: how long the end of a process waits for a copy that is under way.
        change_dtype: go on with `train.compute_dtype` where the run was saved with another one, which is refused otherwise; and
            take arrays that were saved in another floating type as this config has them, rounded.
    """

    every_steps: int = 500
    keep: int = 3
    keep_every_steps: int | None = None
    durable_path: str | None = None
    durable_every_steps: int | None = None
    durable_keep: int = 3
    durable_keep_every_steps: int | None = None
    durable_wait_seconds: float = 120.0
    change_dtype: bool = False

    def problems(self) -> Iterator[Problem]:
        intervals = ("keep_every_steps", "durable_every_steps", "durable_keep_every_steps")
        for name in ("every_steps", "keep", "durable_keep", *intervals):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield Problem(name, value, "must be at least 1")
        for name in intervals:
            value = getattr(self, name)
            if value is not None and value > 0 < self.every_steps and value % self.every_steps:
                yield Problem(name, value, f"must be a multiple of every_steps = {self.every_steps}, or no save falls on it")
        if self.durable_wait_seconds < 0:
            yield Problem("durable_wait_seconds", self.durable_wait_seconds, "must not be negative")
        if self.durable_path == "":
            yield Problem("durable_path", self.durable_path, "names no place", "use None to make no copies")


class EvalConfig(Config):
    """Loss on held-out documents.

    Attributes:
        every_steps: interval; the last step is always evaluated.
        max_rows: rows of the held-out split to read; None reads all of it.
        generic: measure a second time, with every document reading the generic block in place of those of its cluster (both are
            reported in arXiv 2510.02375); evaluations take twice as long.
    """

    every_steps: int = 500
    max_rows: int | None = None
    generic: bool = False

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
