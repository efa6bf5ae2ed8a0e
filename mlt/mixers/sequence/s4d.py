"""S4D and DSS (arXiv 2206.11893, 2203.14343): a diagonal linear system for each channel, with poles that no token moves."""

from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mlt.config.problems import Problem
from mlt.mixers.base import BuildInfo, SequenceMixerConfig
from mlt.mixers.recurrent import RecurrentMixer, Row, empty_state
from mlt.mixers.sizes import not_positive
from mlt.mixers.state_space import DiagonalCore, Form, Poles
from mlt.nn.linear import Linear
from mlt.nn.param import fan_in


class S4D(SequenceMixerConfig):
    """y_t = 2 Re sum_n C_n (e^(Delta lambda_n) - 1) / lambda_n h_t[n] + D x_t, h_t = e^(Delta lambda) h_{t-1} + x_t, for each
    channel of the stream; out = (g W_a) * sigmoid(g W_b) with g = gelu(y).

    lambda = -exp(rate) + i frequency, C and Delta are trained; B is folded into C. With `kernel_length` the gain is DSS's
    softmax over that many taps in place of the zero-order hold; without it, and with linear poles, this is DSS-exp.

    Attributes:
        num_states: complex poles a channel, half the order N of the real system.
        poles: where they start: those of HiPPO-LegS, -1/2 + i pi n (linear), inverse (S4D-Inv), or -(n + 1) (real).
        min_step, max_step: of the step sizes at the start.
        kernel_length: taps (L) of DSS's softmax; None for S4D.
        form: `scan`, or `convolution`: an FFT over rows that hold one document only; other rows give NaN.
        kernel: backend of the recurrence.
    """

    context: ClassVar[str] = "carry"
    op: ClassVar[str] = "diagonal_recurrence"

    num_states: int = 32
    poles: Poles = "legs"
    min_step: float = 1e-3
    max_step: float = 0.1
    kernel_length: int | None = None
    form: Form = "scan"

    def problems(self) -> Iterator[Problem]:
        yield from not_positive(self, "num_states", "kernel_length")
        if not 0 < self.min_step < self.max_step:
            yield Problem("min_step", self.min_step, f"must be between 0 and max_step = {self.max_step}")

    def whole_rows(self) -> str | None:
        return None if self.form == "scan" else "set its form='scan'"

    def build(self, info: BuildInfo) -> "S4DMixer":
        return S4DMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        return 4 * d_model * d_model + 14 * d_model * self.num_states

    def state_size(self, d_model: int, seq_len: int) -> int:
        return 2 * d_model * self.num_states

    @classmethod
    def example(cls) -> tuple["S4D", BuildInfo]:
        return cls(num_states=8), BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class S4DMixer(RecurrentMixer):
    def __init__(self, config: S4D, info: BuildInfo):
        self.config, d = config, info.d_model
        self.core = DiagonalCore(
            d,
            config.num_states,
            start=config.poles,
            steps=(config.min_step, config.max_step),
            form=config.form,
            kernel_length=config.kernel_length,
            backend=config.kernel,
        )
        channels, stream = (("heads", d),), (("embed", d),)
        self.output = Linear(channels, stream, init=fan_in(d, scale=info.residual_scale))
        self.gate = Linear(channels, stream)

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> Any:
        return empty_state(batch, dtype, memory=self.core.state_shape)

    def mix(self, x_BTD: jax.Array, row: Row) -> jax.Array:
        y_BTD = jax.nn.gelu(self.core(x_BTD, row).astype(x_BTD.dtype), approximate=False)
        return self.output(y_BTD) * jax.nn.sigmoid(self.gate(y_BTD))
