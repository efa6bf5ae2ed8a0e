"""Learning-rate schedules, built from optax's."""

from abc import abstractmethod
from collections.abc import Iterator

import optax

from mlt.config.base import Config
from mlt.config.problems import Problem


class Schedule(Config):
    """A multiplier of the peak learning rate as a function of the step."""

    @abstractmethod
    def build(self, peak: float, steps: int) -> optax.Schedule:
        """Learning rate at each of `steps` steps, the first being 0."""


class WarmupCosine(Schedule):
    """Linear warm-up, then half a cosine down to a fraction of the peak at the end of the run.

    Attributes:
        warmup_steps: length of the warm-up.
        final_fraction: learning rate at the end over the peak: the last step is one short of it.
    """

    warmup_steps: int
    final_fraction: float = 0.1

    def problems(self) -> Iterator[Problem]:
        if self.warmup_steps < 0:
            yield Problem("warmup_steps", self.warmup_steps, "must not be negative")
        if not 0 <= self.final_fraction <= 1:
            yield Problem("final_fraction", self.final_fraction, "must lie in [0, 1]")

    def build(self, peak: float, steps: int) -> optax.Schedule:
        warmup = min(self.warmup_steps, steps)
        rise = optax.linear_schedule(peak / (warmup + 1), peak, max(warmup, 1))
        fall = optax.cosine_decay_schedule(peak, max(steps - warmup, 1), alpha=self.final_fraction)
        return optax.join_schedules([rise, fall], [warmup])


class WarmupStableDecay(Schedule):
    """Linear warm-up, a constant stretch, then a linear fall over the last steps (WSD, arXiv 2404.06395).

    Attributes:
        warmup_steps: length of the warm-up.
        decay_steps: length of the fall; of a run too short for both, what the warm-up leaves.
        final_fraction: learning rate at the end over the peak: the last step is one short of it.
    """

    warmup_steps: int
    decay_steps: int
    final_fraction: float = 0.0

    def problems(self) -> Iterator[Problem]:
        for name in ("warmup_steps", "decay_steps"):
            if getattr(self, name) < 0:
                yield Problem(name, getattr(self, name), "must not be negative")
        if not 0 <= self.final_fraction <= 1:
            yield Problem("final_fraction", self.final_fraction, "must lie in [0, 1]")

    def build(self, peak: float, steps: int) -> optax.Schedule:
        warmup = min(self.warmup_steps, steps)
        start = max(steps - self.decay_steps, warmup)
        rise = optax.linear_schedule(peak / (warmup + 1), peak, max(warmup, 1))
        fall = optax.linear_schedule(peak, peak * self.final_fraction, max(steps - start, 1))
        return optax.join_schedules([rise, optax.constant_schedule(peak), fall], [warmup, start])
