"""A block: an ordered list of residual sub-layers, each a norm and a mixer."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mlt.config.base import Config
from mlt.config.problems import Problem
from mlt.errors import UserError
from mlt.mixers.base import Arrays, Aux, BuildInfo, Context, MixerConfig, exchanging, save_point
from mlt.model.remat import Remat
from mlt.model.streams import STREAMS, HyperConnections, Mixing, Place
from mlt.nn.norm import NormKind, stream_norm
from mlt.parallel.taps import reading, with_tables

STREAM = ("batch", "seq", "stream")


class Block(Config):
    """x <- x + mixer(norm(x)) for each mixer in turn.

    Attributes:
        mixers: the sub-layers, in order.
        norm_eps: of the norms.
        norm: `rms`, or `layer` with a mean, a scale and a bias.
        post_norm: also normalize each mixer's output before it is added.
        unit_offset_norm: the norms multiply by 1 + scale.
        residual_scale: factor on each mixer's output before it is added.
    """

    mixers: tuple[MixerConfig, ...]
    norm_eps: float = 1e-6
    norm: NormKind = "rms"
    post_norm: bool = False
    unit_offset_norm: bool = False
    residual_scale: float = 1.0

    def problems(self) -> Iterator[Problem]:
        if not self.mixers:
            yield Problem("mixers", (), "a block needs at least one mixer")
        if self.unit_offset_norm and self.norm == "layer":
            yield Problem("unit_offset_norm", True, "is read with norm='rms' alone", "leave it False")

    def build(self, info: BuildInfo, streams: HyperConnections | None = None, place: Place | None = None) -> "BlockModule":
        """Describe it.

        Args:
            streams: of the stack, if it has several.
            place: of the first sub-layer; the first of all without.
        """
        return BlockModule(self, info, streams, place or Place())


class SubLayer(nnx.Module):
    """One residual addition. With several streams the mixer works on a mixture of them, unless it takes them all itself."""

    def __init__(self, mixer: MixerConfig, config: Block, info: BuildInfo, streams: HyperConnections | None, place: Place):
        several = streams if mixer.num_branches == 1 else None
        self.connection = None if several is None else several.build(info.d_model, place)
        norm = {"eps": config.norm_eps, "unit_offset": config.unit_offset_norm}
        self.norm = stream_norm(config.norm, info.d_model, **norm) if mixer.pre_norm else None
        self.mixer, self.kind = mixer.build(info), type(mixer).__name__
        self.post_norm = stream_norm(config.norm, info.d_model, **norm) if config.post_norm else None
        self.residual_scale = config.residual_scale
        self.replaces = mixer.replaces
        if self.replaces and streams is not None:
            raise UserError(f"{type(mixer).__name__}: takes the place of one stream, and this stack has several; use one")
        self.exchange = getattr(mixer, "exchange", None)
        published = mixer.publishes(info.d_model)
        self.axes = tuple((name, tuple((n, part.axes) for n, part in parts.items())) for name, parts in published.items())
        self.reads, self.shares = tuple(mixer.reads(info.d_model)), tuple(mixer.shares())

    def __call__(self, x: jax.Array, ctx: Context) -> tuple[jax.Array, Aux, dict[str, Arrays]]:
        """(stream (B, T, D), or streams (B, T, M, D), behind it, aux, what it publishes)."""
        x = save_point(x, "sub_layer_in")
        ctx = self._own(ctx, lambda value: save_point(value, "published"))
        ctx = exchanging(ctx, self.exchange)
        # What profiles call the operations.
        with jax.named_scope(self.kind):
            read, mixing = self._read(x)
            y, aux, published = self.mixer.call_and_publish(read, ctx)
            return self._add(x, save_point(y, "mixer_out"), mixing, ctx), aux, self._laid_out(published, ctx)

    def step(self, x: jax.Array, state: Any, ctx: Context) -> tuple[jax.Array, Any, dict[str, Arrays]]:
        inner = self._own(ctx, lambda value: value)
        read, mixing = self._read(x)
        y, state, published = self.mixer.step_and_publish(read, state, inner)
        return self._add(x, y, mixing, ctx), state, {name: published[name] for name, _ in self.axes}

    def _own(self, ctx: Context, each: Callable[[jax.Array], jax.Array]) -> Context:
        """The context with what the mixer declares to read and share, and nothing else of its kind."""
        published = {name: jax.tree.map(each, ctx.published[name]) for name in self.reads}
        return dataclasses.replace(ctx, published=published, shared={name: ctx.shared[name] for name in self.shares})

    def _laid_out(self, published: dict[str, Arrays], ctx: Context) -> dict[str, Arrays]:
        constrain = ctx.rules.constrain
        return {
            name: {part: constrain(published[name][part], ("batch", "seq", *axes)) for part, axes in parts}
            for name, parts in self.axes
        }

    def _read(self, x: jax.Array) -> tuple[jax.Array, Mixing | None]:
        """What the mixer gets, and how its output is written; None where it is added."""
        mixing = None if self.connection is None else self.connection(x)
        read = x if mixing is None else mixing.read(x)
        return (read if self.norm is None else self.norm(read)), mixing

    def _add(self, x: jax.Array, y: jax.Array, mixing: Mixing | None, ctx: Context) -> jax.Array:
        if self.replaces:
            return ctx.rules.constrain(y, STREAM)
        if self.post_norm is not None:
            y = self.post_norm(y)
        if self.residual_scale != 1.0:
            y = y * self.residual_scale
        new = x + y if mixing is None else mixing.write(x, y)
        return ctx.rules.constrain(new, STREAM if new.ndim == len(STREAM) else STREAMS)


class BlockModule(nnx.Module):
    """Runs its sub-layers. What they publish is in the context that is handed back."""

    def __init__(self, config: Block, info: BuildInfo, streams: HyperConnections | None, place: Place):
        made = [SubLayer(mixer, config, info, streams, place.behind(i)) for i, mixer in enumerate(config.mixers)]
        self.sub_layers = nnx.List(made)

    def __call__(self, x_BTD: jax.Array, ctx: Context, remat: Remat, *, in_loop: bool) -> tuple[jax.Array, list[Aux], Context]:
        auxes = []
        for number, sub_layer in enumerate(self.sub_layers):
            run = remat.apply(lambda layer, x, c: layer(x, c), in_loop=in_loop)
            own = dataclasses.replace(ctx, shared=with_tables(ctx.shared, reading(ctx.shared, str(number))))
            x_BTD, aux, published = run(sub_layer, x_BTD, own)
            auxes.append(aux)
            ctx = with_published(ctx, published)
        return x_BTD, auxes, ctx

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> list[Any]:
        return [layer.mixer.init_state(batch, max_length, dtype) for layer in self.sub_layers]

    def step(self, x_BTD: jax.Array, states: list[Any], ctx: Context) -> tuple[jax.Array, list[Any], Context]:
        new = []
        for layer, state in zip(self.sub_layers, states, strict=True):
            x_BTD, state, published = layer.step(x_BTD, state, ctx)
            new.append(state)
            ctx = with_published(ctx, published)
        return x_BTD, new, ctx


def with_published(ctx: Context, published: dict[str, Arrays]) -> Context:
    """The context for the layers behind those that published this."""
    return dataclasses.replace(ctx, published={**ctx.published, **published}) if published else ctx
