"""How a mixer rotates, and frequencies of rotary positions stretched beyond the length a model was trained at."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np

from mlt.config.base import Config
from mlt.config.problems import Problem
from mlt.mixers.sizes import rope_problems
from mlt.nn.rope import rope_frequencies


class RopeScaling(Config, ABC):
    """How the frequencies of the rotary embedding differ from base^(-2i/width).

    Attributes:
        factor: how many times longer than the original length.
    """

    factor: float

    def problems(self) -> Iterator[Problem]:
        if self.factor < 1:
            yield Problem("factor", self.factor, "must be at least 1")

    @abstractmethod
    def frequencies(self, base: float, width: int) -> np.ndarray:
        """(width / 2,) float32 radians per position."""

    @property
    def gain(self) -> float:
        """Factor on rotated queries and keys each."""
        return 1.0


class LinearRope(RopeScaling):
    """Every position divided by `factor` (position interpolation, arXiv 2306.15595)."""

    def frequencies(self, base: float, width: int) -> np.ndarray:
        return (rope_frequencies(base, width) / self.factor).astype(np.float32)


class Llama3Rope(RopeScaling):
    """Slow pairs are interpolated, fast ones kept, with a linear ramp between (Llama 3.1).

    Attributes:
        original_length: tokens the model was first trained at.
        low_freq_factor: a pair that turns fewer times than this over the original length is interpolated in full.
        high_freq_factor: one that turns more often than this stays as it is.
    """

    original_length: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.original_length < 1:
            yield Problem("original_length", self.original_length, "must be at least 1")
        if self.high_freq_factor <= self.low_freq_factor:
            yield Problem("high_freq_factor", self.high_freq_factor, f"must exceed low_freq_factor = {self.low_freq_factor}")

    def frequencies(self, base: float, width: int) -> np.ndarray:
        plain = rope_frequencies(base, width).astype(np.float64)
        turns = self.original_length * plain / (2 * math.pi)
        kept = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0.0, 1.0)
        return (plain * (kept + (1 - kept) / self.factor)).astype(np.float32)


class YarnRope(RopeScaling):
    """YaRN (arXiv 2309.00071): a ramp over pairs between interpolation and none, and a gain on the scores.

    Attributes:
        original_length: tokens the model was first trained at.
        beta_fast: pairs that turn more often than this over the original length stay as they are.
        beta_slow: pairs that turn fewer times are interpolated in full.
        attention_gain: factor on rotated queries and keys; None means 0.1 ln(factor) + 1.
        truncate: round the ends of the ramp outwards to whole pairs.
    """

    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_gain: float | None = None
    truncate: bool = True

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.original_length < 1:
            yield Problem("original_length", self.original_length, "must be at least 1")
        if self.beta_fast <= self.beta_slow:
            yield Problem("beta_fast", self.beta_fast, f"must exceed beta_slow = {self.beta_slow}")

    @property
    def gain(self) -> float:
        return 0.1 * math.log(self.factor) + 1.0 if self.attention_gain is None else self.attention_gain

    def frequencies(self, base: float, width: int) -> np.ndarray:
        def pair(turns: float) -> float:
            return width * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        plain = rope_frequencies(base, width).astype(np.float64)
        ramp = np.clip((np.arange(width // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
        return (plain * (1 - ramp) + plain / self.factor * ramp).astype(np.float32)


def rotation(config: Any) -> dict[str, Any]:
    """Keyword arguments of `apply_rope` for a config with head_dim, rope_base, rotary_dim and rope_scaling."""
    base, width, scaling = config.rope_base, config.rotary_dim or config.head_dim, config.rope_scaling
    if scaling is not None:
        return {"base": base, "frequency": scaling.frequencies(base, width), "gain": scaling.gain}
    return {"base": base, "frequency": None if config.rotary_dim is None else rope_frequencies(base, width)}


def rotation_form(base: float | None, rotary_dim: int | None = None, scaling: RopeScaling | None = None) -> str:
    """How published keys are rotated, in words: queries that meet them must be rotated alike."""
    if base is None:
        return "without rotation"
    channels = "" if rotary_dim is None else f" in {rotary_dim} channels"
    return f"rotated by base {base:g}{channels}" + ("" if scaling is None else f", {scaling!r}")


def rotation_problems(config: Any) -> Iterator[Problem]:
    """Rules of the fields that `rotation` reads."""
    base, width, head = config.rope_base, config.rotary_dim, config.head_dim
    if base is None:
        for name in ("rotary_dim", "rope_scaling"):
            if getattr(config, name) is not None:
                rule = "is read with rotary positions alone"
                yield Problem(name, getattr(config, name), rule, "leave it None, or set rope_base")
        return
    if width is None:
        yield from rope_problems(config)
        return
    if base <= 0:
        yield Problem("rope_base", base, "must be positive", "None turns it off")
    if width % 2 or not 2 <= width <= head:
        yield Problem("rotary_dim", width, f"must be even and lie in [2, head_dim = {head}]")
