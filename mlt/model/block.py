"""A block: an ordered list of residual sub-layers, each a norm and a mixer."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mlt.config.base import Config
from mlt.config.problems import Problem
from mlt.mixers.base import Aux, BuildInfo, Context, MixerConfig, save_point
from mlt.model.remat import Remat
from mlt.nn.norm import RMSNorm

STREAM = ("batch", "seq", "stream")


class Block(Config):
    """x <- x + mixer(norm(x)) for each mixer in turn.

    Attributes:
        mixers: the sub-layers, in order.
        norm_eps: of the norms.
        post_norm: also normalize each mixer's output before it is added.
        unit_offset_norm: the norms multiply by 1 + scale.
        residual_scale: factor on each mixer's output before it is added.
    """

    mixers: tuple[MixerConfig, ...]
    norm_eps: float = 1e-6
    post_norm: bool = False
    unit_offset_norm: bool = False
    residual_scale: float = 1.0

    def problems(self) -> Iterator[Problem]:
        if not self.mixers:
            yield Problem("mixers", (), "a block needs at least one mixer")

    def build(self, info: BuildInfo) -> "BlockModule":
        return BlockModule(self, info)


class SubLayer(nnx.Module):
    """One residual addition."""

    def __init__(self, mixer: MixerConfig, config: Block, info: BuildInfo):
        norm = {"axis": "embed", "eps": config.norm_eps, "unit_offset": config.unit_offset_norm}
        self.norm = RMSNorm(info.d_model, **norm) if mixer.pre_norm else None
        self.mixer = mixer.build(info)
        self.post_norm = RMSNorm(info.d_model, **norm) if config.post_norm else None
        self.residual_scale = config.residual_scale
        self.exchange = getattr(mixer, "exchange", None)

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        x_BTD = save_point(x_BTD, "sub_layer_in")
        if self.exchange is not None:
            ctx = dataclasses.replace(ctx, rules=ctx.rules.exchanging(self.exchange))
        y_BTD, aux = self.mixer(x_BTD if self.norm is None else self.norm(x_BTD), ctx)
        return self._add(x_BTD, save_point(y_BTD, "mixer_out"), ctx), aux

    def step(self, x_BTD: jax.Array, state: Any, ctx: Context) -> tuple[jax.Array, Any]:
        y_BTD, state = self.mixer.step(x_BTD if self.norm is None else self.norm(x_BTD), state, ctx)
        return self._add(x_BTD, y_BTD, ctx), state

    def _add(self, x_BTD, y_BTD, ctx):
        if self.post_norm is not None:
            y_BTD = self.post_norm(y_BTD)
        if self.residual_scale != 1.0:
            y_BTD = y_BTD * self.residual_scale
        return ctx.rules.constrain(x_BTD + y_BTD, STREAM)


class BlockModule(nnx.Module):
    def __init__(self, config: Block, info: BuildInfo):
        self.sub_layers = nnx.List([SubLayer(mixer, config, info) for mixer in config.mixers])

    def __call__(self, x_BTD: jax.Array, ctx: Context, remat: Remat, *, in_loop: bool) -> tuple[jax.Array, list[Aux]]:
        auxes = []
        for sub_layer in self.sub_layers:
            run = remat.apply(lambda layer, x, c: layer(x, c), in_loop=in_loop)
            x_BTD, aux = run(sub_layer, x_BTD, ctx)
            auxes.append(aux)
        return x_BTD, auxes

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> list[Any]:
        return [layer.mixer.init_state(batch, max_length, dtype) for layer in self.sub_layers]

    def step(self, x_BTD: jax.Array, states: list[Any], ctx: Context) -> tuple[jax.Array, list[Any]]:
        new = []
        for layer, state in zip(self.sub_layers, states, strict=True):
            x_BTD, state = layer.step(x_BTD, state, ctx)
            new.append(state)
        return x_BTD, new
