"""SwiGLU feed-forward (arXiv 2002.05202)."""

from collections.abc import Iterator
from typing import Literal

import jax

from mlt.config.problems import Problem
from mlt.mixers.base import Aux, BuildInfo, ChannelMixerConfig, Context, Mixer, save_point
from mlt.nn.activations import ACTIVATIONS
from mlt.nn.linear import Linear
from mlt.nn.param import fan_in


class SwiGLU(ChannelMixerConfig):
    """y = W_down (silu(W_gate x) * W_up x), or with another activation in place of the silu (GEGLU, arXiv 2002.05202).

    Attributes:
        d_ff: hidden width (F).
        activation: of the gate; gelu_tanh is the tanh form of the GELU.
        bias: biases on the three projections.
        gate_scale: factor on what the activation is taken of.
        output_scale: factor on the result.
    """

    d_ff: int
    activation: Literal["silu", "gelu_tanh"] = "silu"
    bias: bool = False
    gate_scale: float = 1.0
    output_scale: float = 1.0

    def problems(self) -> Iterator[Problem]:
        if self.d_ff < 1:
            yield Problem("d_ff", self.d_ff, "must be at least 1")

    def build(self, info: BuildInfo) -> "SwiGLUMixer":
        return SwiGLUMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        return 6 * d_model * self.d_ff

    def state_size(self, d_model: int, seq_len: int) -> int:
        return 0

    @classmethod
    def example(cls) -> tuple["SwiGLU", BuildInfo]:
        return cls(d_ff=48), BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class SwiGLUMixer(Mixer):
    def __init__(self, config: SwiGLU, info: BuildInfo):
        self.config = config
        stream, hidden = (("embed", info.d_model),), (("ffn", config.d_ff),)
        self.gate = Linear(stream, hidden, bias=config.bias)
        self.up = Linear(stream, hidden, bias=config.bias)
        self.down = Linear(hidden, stream, init=fan_in(config.d_ff, scale=info.residual_scale), bias=config.bias)

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        config = self.config
        gate = self.gate(x_BTD) if config.gate_scale == 1.0 else self.gate(x_BTD) * config.gate_scale
        hidden = save_point(ACTIVATIONS[config.activation](gate) * self.up(x_BTD), "ffn_hidden")
        y_BTD = self.down(hidden)
        return y_BTD if config.output_scale == 1.0 else y_BTD * config.output_scale, {}
