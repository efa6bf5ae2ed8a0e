"""Double-gated short convolution: the cheapest sequence mixer, for layers that need only local context."""

from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mlt.config.problems import Problem
from mlt.mixers.base import BuildInfo, SequenceMixerConfig
from mlt.mixers.conv import CausalConv
from mlt.mixers.recurrent import RecurrentMixer, Row, empty_state
from mlt.nn.linear import Linear
from mlt.nn.param import fan_in


class ShortConv(SequenceMixerConfig):
    """y = W_o (c * conv(b * u)) with b, c, u linear in x: the gated short convolution block of LFM2 (arXiv 2511.23404).

    Attributes:
        width: taps of the convolution.
    """

    context: ClassVar[str] = "halo"
    op: ClassVar[str] = "causal_conv"

    width: int = 3

    def problems(self) -> Iterator[Problem]:
        if not 2 <= self.width <= 8:
            yield Problem("width", self.width, "must be between 2 and 8")

    def build(self, info: BuildInfo) -> "ShortConvMixer":
        return ShortConvMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        return 8 * d_model * d_model + 2 * self.width * d_model

    def state_size(self, d_model: int, seq_len: int) -> int:
        return (self.width - 1) * d_model

    @classmethod
    def example(cls) -> tuple["ShortConv", BuildInfo]:
        return cls(), BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class ShortConvMixer(RecurrentMixer):
    def __init__(self, config: ShortConv, info: BuildInfo):
        self.config = config
        d = info.d_model
        stream, channels = (("embed", d),), (("heads", d),)
        self.value = Linear(stream, channels)
        self.input_gate = Linear(stream, channels)
        self.output_gate = Linear(stream, channels)
        self.conv = CausalConv(channels, width=config.width, activation=None, backend=config.kernel)
        self.output = Linear(channels, stream, init=fan_in(d, scale=info.residual_scale))

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> Any:
        return empty_state(batch, dtype, {"halo": self.conv})

    def mix(self, x_BTD: jax.Array, row: Row) -> jax.Array:
        mixed = row.conv("halo", self.conv, self.input_gate(x_BTD) * self.value(x_BTD))
        return self.output(self.output_gate(x_BTD) * mixed)
