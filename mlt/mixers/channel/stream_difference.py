"""What the layers between two places of a stack added to its stream, added once more (LongMem, arXiv 2306.07174)."""

from collections.abc import Iterator, Mapping

import jax

from mlt.config.problems import Problem
from mlt.mixers.base import EMBEDDING, Aux, BuildInfo, ChannelMixerConfig, Context, Mixer, MixerConfig, Published
from mlt.mixers.channel.mlp import MLP
from mlt.mixers.published_stream import PublishStream, stream_part


class StreamDifference(ChannelMixerConfig):
    """y = H_after - H_before, two published streams: what the layers between them added.

    Attributes:
        after: name of the later one.
        before: name of the earlier one; the embedded tokens by default.
    """

    pre_norm = False

    after: str
    before: str = EMBEDDING

    def problems(self) -> Iterator[Problem]:
        if self.after == self.before:
            yield Problem("after", self.after, "is also before: their difference is nothing", "name a later stream")

    def build(self, info: BuildInfo) -> "StreamDifferenceMixer":
        return StreamDifferenceMixer(self)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        return d_model

    def state_size(self, d_model: int, seq_len: int) -> int:
        return 0

    def reads(self, d_model: int) -> Mapping[str, Published]:
        return {name: stream_part(d_model) for name in (self.after, self.before)}

    @classmethod
    def example(cls) -> tuple["StreamDifference", BuildInfo]:
        return cls(after="after", before="before"), BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)

    @classmethod
    def example_publishers(cls) -> tuple[MixerConfig, ...]:
        return (PublishStream(name="before"), MLP(d_ff=16), PublishStream(name="after"))


class StreamDifferenceMixer(Mixer):
    def __init__(self, config: StreamDifference):
        self.config = config

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        after, before = (ctx.published[name]["stream"] for name in (self.config.after, self.config.before))
        return (after - before).astype(x_BTD.dtype), {}
