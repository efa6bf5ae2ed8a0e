"""The residual stream at a place of a stack, handed to later layers, and taken up again by them.

Not in a folder of mixers, which the conformance suite tests one by one: these compute nothing. `StreamDifference` is tested
behind the one, and a side network that starts from the other in `tests/mixers/test_long_mem.py`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mlt.mixers.base import EMBEDDING, Arrays, Aux, BuildInfo, ChannelMixerConfig, Context, Mixer, Part, Published


def stream_part(d_model: int) -> Published:
    """The stream, as it is published."""
    return {"stream": Part((d_model,), ("stream",))}


class PublishStream(ChannelMixerConfig):
    """Publishes the stream that enters it, and leaves it as it is.

    Attributes:
        name: under which later layers read it.
    """

    pre_norm = False

    name: str

    def build(self, info: BuildInfo) -> "PublishStreamMixer":
        return PublishStreamMixer(self)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        return 0

    def state_size(self, d_model: int, seq_len: int) -> int:
        return 0

    def publishes(self, d_model: int) -> Mapping[str, Published]:
        return {self.name: stream_part(d_model)}

    @classmethod
    def example(cls) -> tuple["PublishStream", BuildInfo]:
        return cls(name="stream"), BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class PublishStreamMixer(Mixer):
    def __init__(self, config: PublishStream):
        self.config = config

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        return jnp.zeros_like(x_BTD), {}

    def call_and_publish(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux, dict[str, Arrays]]:
        return jnp.zeros_like(x_BTD), {}, {self.config.name: {"stream": x_BTD}}

    def step_and_publish(self, x_BTD: jax.Array, state: Any, ctx: Context) -> tuple[jax.Array, Any, dict[str, Arrays]]:
        return jnp.zeros_like(x_BTD), state, {self.config.name: {"stream": x_BTD}}


class TakeStream(ChannelMixerConfig):
    """The stream becomes a published one: y takes the place of x, and is not added to it.

    Attributes:
        source: name under which it was published; the embedded tokens by default.
    """

    pre_norm = False
    replaces: ClassVar[bool] = True

    source: str = EMBEDDING

    def build(self, info: BuildInfo) -> "TakeStreamMixer":
        return TakeStreamMixer(self)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        return 0

    def state_size(self, d_model: int, seq_len: int) -> int:
        return 0

    def reads(self, d_model: int) -> Mapping[str, Published]:
        return {self.source: stream_part(d_model)}

    @classmethod
    def example(cls) -> tuple["TakeStream", BuildInfo]:
        return cls(), BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class TakeStreamMixer(Mixer):
    def __init__(self, config: TakeStream):
        self.config = config

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        return ctx.published[self.config.source]["stream"].astype(x_BTD.dtype), {}
