"""Gated memory unit (SambaY, arXiv 2507.06607): another layer's token mixing, read through a gate of one's own."""

from collections.abc import Iterator, Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from mlt.config.problems import Problem
from mlt.mixers.base import Aux, BuildInfo, Context, Mixer, MixerConfig, Part, Published, SequenceMixerConfig, save_point
from mlt.mixers.sequence.mamba import Mamba
from mlt.mixers.sizes import not_divisor, not_positive
from mlt.nn.linear import Linear
from mlt.nn.norm import rms_normalize
from mlt.nn.param import fan_in, ones, param


class GMU(SequenceMixerConfig):
    """y = W_2 (M * silu(W_1 x)), M being the `memory` that an earlier recurrence published for the same token.

    With `norm`, an RMS norm of each of `norm_groups` groups of channels sits behind the gate (nGMU, needed for the memories
    of Mamba-2 and the gated delta rule). The layer keeps nothing while decoding.

    Attributes:
        source: name under which the memory was published.
        memory_dim: its channels.
        norm: norm the gated memory.
        norm_groups: groups of channels that are normed apart, a divisor of memory_dim.
        norm_eps: of that norm.
    """

    context: ClassVar[str] = "halo"

    source: str
    memory_dim: int
    norm: bool = False
    norm_groups: int = 1
    norm_eps: float = 1e-5

    def problems(self) -> Iterator[Problem]:
        sizes = list(not_positive(self, "memory_dim", "norm_groups"))
        yield from sizes or not_divisor(self, "norm_groups", "memory_dim")
        if self.kernel is not None:
            yield Problem("kernel", self.kernel, "must be None: there is one implementation")

    def build(self, info: BuildInfo) -> "GMUMixer":
        return GMUMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        return 4 * d_model * self.memory_dim

    def state_size(self, d_model: int, seq_len: int) -> int:
        return 0

    def reads(self, d_model: int) -> Mapping[str, Published]:
        return {self.source: {"memory": Part((self.memory_dim,), ("heads",))}}

    @classmethod
    def example(cls) -> tuple["GMU", BuildInfo]:
        config = cls(source="memory", memory_dim=64, norm=True, norm_groups=4)
        return config, BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)

    @classmethod
    def example_publishers(cls) -> tuple[MixerConfig, ...]:
        return (Mamba(state_dim=4, publish="memory"),)


class GMUMixer(Mixer):
    def __init__(self, config: GMU, info: BuildInfo):
        self.config = config
        stream, channels = (("embed", info.d_model),), (("heads", config.memory_dim),)
        self.gate = Linear(stream, channels)
        self.norm_scale = param((config.memory_dim,), ("heads",), ones, group="vector") if config.norm else None
        self.output = Linear(channels, stream, init=fan_in(config.memory_dim, scale=info.residual_scale))

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        memory_BTM = ctx.published[self.config.source]["memory"]
        gated_BTM = save_point(memory_BTM * jax.nn.silu(self.gate(x_BTD)), "ffn_hidden")
        return self.output(gated_BTM if self.norm_scale is None else self._norm(gated_BTM)), {}

    def _norm(self, gated_BTM: jax.Array) -> jax.Array:
        grouped = gated_BTM.astype(jnp.float32).reshape(*gated_BTM.shape[:2], self.config.norm_groups, -1)
        normed = rms_normalize(grouped, eps=self.config.norm_eps).reshape(gated_BTM.shape)
        return (normed * self.norm_scale[...]).astype(gated_BTM.dtype)
