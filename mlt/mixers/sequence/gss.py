"""GSS (arXiv 2206.13947): a diagonal state space on few channels inside a wide gated unit."""

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


class GSS(SequenceMixerConfig):
    """out = W_o ((ssm(gelu(x W_u)) W_c) * gelu(x W_v)), with the diagonal system of `S4D` as ssm.

    Attributes:
        width: channels of the system; None means a quarter of d_model.
        ffn: width of the gated unit; None means four times d_model.
        num_states: complex poles a channel.
        poles: where they start, as for `S4D`.
        min_step, max_step: of the step sizes at the start.
        form: `scan`, or `convolution`: an FFT over rows that hold one document only; other rows give NaN.
        kernel: backend of the recurrence.
    """

    context: ClassVar[str] = "carry"
    op: ClassVar[str] = "diagonal_recurrence"

    width: int | None = None
    ffn: int | None = None
    num_states: int = 32
    poles: Poles = "linear"
    min_step: float = 1e-3
    max_step: float = 0.1
    form: Form = "scan"

    def problems(self) -> Iterator[Problem]:
        yield from not_positive(self, "width", "ffn", "num_states")
        if not 0 < self.min_step < self.max_step:
            yield Problem("min_step", self.min_step, f"must be between 0 and max_step = {self.max_step}")

    def sizes(self, d_model: int) -> tuple[int, int]:
        """(channels of the system, width of the gated unit)"""
        return self.width or max(d_model // 4, 1), self.ffn or 4 * d_model

    def whole_rows(self) -> str | None:
        return None if self.form == "scan" else "set its form='scan'"

    def build(self, info: BuildInfo) -> "GSSMixer":
        return GSSMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        width, ffn = self.sizes(d_model)
        return 2 * (d_model * width + 2 * d_model * ffn + width * ffn) + 14 * width * self.num_states

    def state_size(self, d_model: int, seq_len: int) -> int:
        return 2 * self.sizes(d_model)[0] * self.num_states

    @classmethod
    def example(cls) -> tuple["GSS", BuildInfo]:
        return cls(num_states=4, width=16, ffn=64), BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class GSSMixer(RecurrentMixer):
    def __init__(self, config: GSS, info: BuildInfo):
        self.config = config
        width, ffn = config.sizes(info.d_model)
        steps = (config.min_step, config.max_step)
        self.core = DiagonalCore(
            width, config.num_states, start=config.poles, steps=steps, form=config.form, backend=config.kernel
        )
        stream, channels, unit = (("embed", info.d_model),), (("heads", width),), (("ffn", ffn),)
        self.value = Linear(stream, channels)
        self.gate = Linear(stream, unit)
        # Tensor shards cannot split both sides of this matrix; its input is the narrow one.
        self.widen = Linear((("embed", width),), unit)
        self.output = Linear(unit, stream, init=fan_in(ffn, scale=info.residual_scale))

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> Any:
        return empty_state(batch, dtype, memory=self.core.state_shape)

    def mix(self, x_BTD: jax.Array, row: Row) -> jax.Array:
        u_BTW = jax.nn.gelu(self.value(x_BTD), approximate=False)
        y_BTF = self.widen(self.core(u_BTW, row).astype(x_BTD.dtype))
        return self.output(y_BTF * jax.nn.gelu(self.gate(x_BTD), approximate=False))
