"""Mixers side by side in one sub-layer: parallel attention and SSM heads as in Falcon-H1 (arXiv 2507.22448)."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from mlt.config.base import Config
from mlt.config.problems import Problem
from mlt.mixers.base import Arrays, Aux, BuildInfo, Context, Mixer, MixerConfig, Published, SequenceMixerConfig, exchanging
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.mamba2 import Mamba2


class Parallel(SequenceMixerConfig):
    """y = sum over the mixers of output_scale * mixer(input_scale * x), all of one normed input.

    What the mixers publish and read, the layer publishes and reads; they do not read from each other.

    Attributes:
        mixers: the mixers; backends are named on them.
        input_scales: a factor on the input of each; None means 1.
        output_scales: a factor on the output of each; None means 1.
    """

    context: ClassVar[str] = "carry"

    mixers: tuple[MixerConfig, ...]
    input_scales: tuple[float, ...] | None = None
    output_scales: tuple[float, ...] | None = None

    def problems(self) -> Iterator[Problem]:
        if not self.mixers:
            yield Problem("mixers", (), "needs at least one mixer")
        for name in ("input_scales", "output_scales"):
            scales = getattr(self, name)
            if scales is not None and len(scales) != len(self.mixers):
                yield Problem(name, scales, f"must have one number for each of {len(self.mixers)} mixers")
        for number, mixer in enumerate(self.mixers):
            if not mixer.pre_norm:
                yield Problem(f"mixers[{number}]", type(mixer).__name__, "norms its own input and cannot share a norm")
        if self.kernel is not None:
            yield Problem("kernel", self.kernel, "belongs to the mixers inside", "set it on one of `mixers`")

    def build(self, info: BuildInfo) -> "ParallelMixer":
        return ParallelMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        return sum(mixer.flops_per_token(d_model, seq_len) for mixer in self.mixers)

    def state_size(self, d_model: int, seq_len: int) -> int:
        return sum(mixer.state_size(d_model, seq_len) for mixer in self.mixers)

    def inactive_params(self, d_model: int) -> int:
        return sum(mixer.inactive_params(d_model) for mixer in self.mixers)

    def publishes(self, d_model: int) -> Mapping[str, Published]:
        return {name: parts for mixer in self.mixers for name, parts in mixer.publishes(d_model).items()}

    def reads(self, d_model: int) -> Mapping[str, Published]:
        return {name: parts for mixer in self.mixers for name, parts in mixer.reads(d_model).items()}

    def shares(self) -> Mapping[str, Config]:
        return {name: part for mixer in self.mixers for name, part in mixer.shares().items()}

    @classmethod
    def example(cls) -> tuple["Parallel", BuildInfo]:
        mixers = (Mamba2(num_heads=2, head_dim=8, state_dim=8), Attention(num_heads=2, head_dim=8))
        return cls(mixers=mixers, output_scales=(0.5, 2.0)), BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class ParallelMixer(Mixer):
    def __init__(self, config: Parallel, info: BuildInfo):
        self.config = config
        self.mixers = nnx.List([mixer.build(info) for mixer in config.mixers])
        self.exchanges = tuple(getattr(mixer, "exchange", None) for mixer in config.mixers)

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        return self.call_and_publish(x_BTD, ctx)[:2]

    def call_and_publish(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux, dict[str, Arrays]]:
        outputs, aux, published = [], {}, {}
        for number, mixer in enumerate(self.mixers):
            y_BTD, own, values = mixer.call_and_publish(self._input(x_BTD, number), exchanging(ctx, self.exchanges[number]))
            outputs.append(y_BTD)
            aux |= {f"{name}/{number}": value for name, value in own.items()}
            published |= values
        return self._sum(outputs), aux, published

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> Any:
        return [mixer.init_state(batch, max_length, dtype) for mixer in self.mixers]

    def step(self, x_BTD: jax.Array, state: Any, ctx: Context) -> tuple[jax.Array, Any]:
        return self.step_and_publish(x_BTD, state, ctx)[:2]

    def step_and_publish(self, x_BTD: jax.Array, state: Any, ctx: Context) -> tuple[jax.Array, Any, dict[str, Arrays]]:
        found = [
            mixer.step_and_publish(self._input(x_BTD, number), own, ctx)
            for number, (mixer, own) in enumerate(zip(self.mixers, state, strict=True))
        ]
        outputs, states, published = zip(*found, strict=True)
        return self._sum(list(outputs)), list(states), {name: value for each in published for name, value in each.items()}

    def updated(self, aux: Aux) -> "ParallelMixer":
        return self._each(aux, lambda mixer, own: mixer.updated(own))

    def within_step(self, aux: Aux) -> "ParallelMixer":
        return self._each(aux, lambda mixer, own: mixer.within_step(own))

    def _each(self, aux: Aux, change: Callable[[Mixer, Aux], Mixer]) -> "ParallelMixer":
        new = jax.tree.map(lambda leaf: leaf, self)
        for number, mixer in enumerate(new.mixers):
            end = f"/{number}"
            new.mixers[number] = change(mixer, {name.removesuffix(end): v for name, v in aux.items() if name.endswith(end)})
        return new

    def _input(self, x_BTD, number):
        scales = self.config.input_scales
        return x_BTD if scales is None else x_BTD * scales[number]

    def _sum(self, outputs):
        scales = self.config.output_scales
        if scales is not None:
            outputs = [y_BTD * scale for y_BTD, scale in zip(outputs, scales, strict=True)]
        return sum(outputs[1:], outputs[0])
