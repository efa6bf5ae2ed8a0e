"""Feed-forward without a gate: two matrices and a nonlinearity between."""

from collections.abc import Iterator
from typing import Literal

import jax

from mlt.config.problems import Problem
from mlt.mixers.base import Aux, BuildInfo, ChannelMixerConfig, Context, Mixer, save_point
from mlt.nn.activations import ACTIVATIONS
from mlt.nn.linear import Linear
from mlt.nn.param import fan_in


class MLP(ChannelMixerConfig):
    """y = W_down activation(W_up x).

    Attributes:
        d_ff: hidden width (F).
        activation: relu2 is the squared ReLU of Primer (arXiv 2109.08668).
        bias: biases on both projections.
    """

    d_ff: int
    activation: Literal["relu", "relu2", "gelu", "silu"] = "relu2"
    bias: bool = False

    def problems(self) -> Iterator[Problem]:
        if self.d_ff < 1:
            yield Problem("d_ff", self.d_ff, "must be at least 1")

    def build(self, info: BuildInfo) -> "MLPMixer":
        return MLPMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        return 4 * d_model * self.d_ff

    def state_size(self, d_model: int, seq_len: int) -> int:
        return 0

    @classmethod
    def example(cls) -> tuple["MLP", BuildInfo]:
        return cls(d_ff=48, bias=True), BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class MLPMixer(Mixer):
    def __init__(self, config: MLP, info: BuildInfo):
        self.config = config
        stream, hidden = (("embed", info.d_model),), (("ffn", config.d_ff),)
        self.up = Linear(stream, hidden, bias=config.bias)
        self.down = Linear(hidden, stream, init=fan_in(config.d_ff, scale=info.residual_scale), bias=config.bias)

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        hidden = save_point(ACTIVATIONS[self.config.activation](self.up(x_BTD)), "ffn_hidden")
        return self.down(hidden), {}
