"""Traces of a few steps by JAX's profiler: what devices and threads did when, for XProf, TensorBoard or Perfetto."""

from collections.abc import Iterator
from pathlib import Path

import jax

from mlt.config.base import Config
from mlt.config.problems import Problem


class ProfileConfig(Config):
    """Which steps of a run are traced. Devices are idle where a trace begins and ends, so that it holds whole steps.

    Attributes:
        first_step: the first of them; the very first steps of a run are slower than those that follow.
        steps: how many.
        perfetto: also write the trace as `perfetto_trace.json.gz`, which https://ui.perfetto.dev opens without XProf.
    """

    first_step: int = 10
    steps: int = 3
    perfetto: bool = False

    def problems(self) -> Iterator[Problem]:
        for name in ("first_step", "steps"):
            if getattr(self, name) < 1:
                yield Problem(name, getattr(self, name), "must be at least 1")


class Profiler:
    """Traces the steps that the config names.

    Args:
        config: None traces nothing.
        folder: where traces are written, each under the time it began.
    """

    def __init__(self, config: ProfileConfig | None, folder: Path):
        self.config, self.folder = config, folder
        self._begun: int | None = None

    def turns(self, step: int) -> bool:
        """Whether a trace begins or ends between this step and the next."""
        return self._wants(step + 1) != (self._begun is not None)

    def turn(self, step: int) -> str | None:
        """Begin or end a trace behind this step; what there is to say of it. One that fails is given up, and no run with it."""
        try:
            if self._begun is not None:
                first, self._begun = self._begun, None
                jax.profiler.stop_trace()
                steps = f"step {step} is" if first == step else f"steps {first} to {step} are"
                return f"profile: {steps} in {self.folder}; xprof --logdir {self.folder} shows it" if first <= step else None
            self.folder.mkdir(parents=True, exist_ok=True)
            perfetto = self.config is not None and self.config.perfetto
            jax.profiler.start_trace(self.folder, create_perfetto_trace=perfetto)
            self._begun = step + 1
        except (RuntimeError, OSError) as error:
            self.config = None
            return f"warning: no profile in {self.folder}: {error}; training goes on"
        return None

    def close(self, step: int) -> str | None:
        """End a trace that is open when the run leaves its steps, this one the last."""
        return self.turn(step) if self._begun is not None else None

    def _wants(self, step: int) -> bool:
        config = self.config
        return config is not None and config.first_step <= step < config.first_step + config.steps
