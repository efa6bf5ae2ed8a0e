"""The stack: a head and a tail of blocks, and between them a period of blocks repeated by one `lax.scan`, or two of them.

Every block of a period has its own parameters in every repeat; only the program is shared. A hybrid of any depth
therefore compiles one period, not one program per layer. Decoders of two halves (YOCO, SambaY) have an upper period.

Layers may publish values to later ones and share parameters (`model/edges.py` has the rules). Published values travel in
the context, from layer to layer beside the stream; shared modules are kept once, under `shared`.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mlt.config.base import Config
from mlt.config.problems import Problem
from mlt.mixers.base import EMBEDDING, BuildInfo, Context, Mixer, MixerConfig
from mlt.model.block import STREAM, Block, BlockModule, with_published
from mlt.model.edges import PARTS, SCANNED, UNROLLED, carried, shared_parts
from mlt.model.remat import Remat
from mlt.model.streams import STREAMS, HyperConnections, Place, branch_problems, expanded
from mlt.nn.param import stack_specs
from mlt.parallel.taps import TapedTable, reading, with_tables

MAX_UNROLLED = 12
StackAux = dict[str, Any]


class Stack(Config):
    """num_layers = len(head) + repeats * len(period) + len(middle) + upper_repeats * len(upper) + len(tail), in this order.

    Attributes:
        head: unrolled blocks in front.
        period: blocks repeated by scan.
        repeats: how often.
        middle: unrolled blocks behind them.
        upper: a second period, repeated by a scan of its own.
        upper_repeats: how often.
        tail: unrolled blocks behind.
        hyper_connections: several residual streams, and how sub-layers read and write them; None for one stream.
    """

    head: tuple[Block, ...] = ()
    period: tuple[Block, ...] = ()
    repeats: int = 1
    middle: tuple[Block, ...] = ()
    upper: tuple[Block, ...] = ()
    upper_repeats: int = 1
    tail: tuple[Block, ...] = ()
    hyper_connections: HyperConnections | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers())

    def layers(self) -> list[Block]:
        """Every block in depth order."""
        return [block for part in PARTS for block in getattr(self, part) * self.times(part)]

    def times(self, part: str) -> int:
        """How often the blocks of a part are run."""
        return {"period": self.repeats, "upper": self.upper_repeats}.get(part, 1)

    def mixers(self) -> list[MixerConfig]:
        """Every mixer in depth order."""
        return [mixer for block in self.layers() for mixer in block.mixers]

    def problems(self) -> Iterator[Problem]:
        for name in ("repeats", "upper_repeats"):
            if getattr(self, name) < 1:
                yield Problem(name, getattr(self, name), "must be at least 1", "empty the period to have no scanned blocks")
        if not any(getattr(self, part) for part in PARTS):
            yield Problem("period", (), "the stack has no blocks")
        for name in UNROLLED:
            count = len(getattr(self, name))
            if count > MAX_UNROLLED:
                rule = f"holds {count} unrolled blocks; more than {MAX_UNROLLED} compile slowly"
                yield Problem(name, count, rule, "move repeating blocks into the period")
        yield from branch_problems(self)

    def places(self, part: str) -> list[Place]:
        """Where the first sub-layer of each block of a part stands."""
        in_front = PARTS[: PARTS.index(part)]
        number = sum(len(block.mixers) * self.times(other) for other in in_front for block in getattr(self, other))
        sizes = [len(block.mixers) for block in getattr(self, part)]
        stride = sum(sizes) if part in SCANNED else 0
        return [Place(number + sum(sizes[:i]), stride) for i in range(len(sizes))]

    def build(self, info: BuildInfo) -> "StackModule":
        return StackModule(self, info)


class StackModule(nnx.Module):
    """Attributes:
    shared: modules that several layers use, closed over by the scan: one gradient, the sum over their uses.
    collapse: makes one stream of several at the end; None where there is one.
    """

    def __init__(self, config: Stack, info: BuildInfo):
        self.config, streams = config, config.hyper_connections
        for part in PARTS:
            placed = zip(getattr(config, part), config.places(part), strict=True)
            blocks = [block.build(info, streams, place) for block, place in placed]
            setattr(self, part, nnx.List([stack_specs(b, config.times(part)) for b in blocks] if part in SCANNED else blocks))
        self.shared = nnx.Dict({name: part.build(info) for name, part in shared_parts(config).items()})
        self.carried = tuple((part, carried(config, part, info.d_model)) for part in SCANNED)
        self.collapse = None if streams is None else streams.collapse(info.d_model)

    def __call__(self, x_BTD: jax.Array, ctx: Context, remat: Remat) -> tuple[jax.Array, StackAux]:
        x, ctx, auxes = self._expanded(x_BTD, ctx), self._entering(x_BTD, ctx), {}
        for part in PARTS:
            in_loop = part in SCANNED and self.config.times(part) > 1

            def run(block: BlockModule, x: jax.Array, ctx: Context, in_loop: bool = in_loop) -> tuple[jax.Array, Any, Context]:
                return block(x, ctx, remat, in_loop=in_loop)

            x, auxes[part], ctx = self._run(part, run, list(getattr(self, part)), x, ctx)
        return self._collapsed(x, ctx), auxes

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> dict[str, Any]:
        """Decoding state of every layer; that of a period is stacked over repeats."""

        def make(part: str) -> list[Any]:
            states = [block.init_state(batch, max_length, dtype) for block in getattr(self, part)]
            times = self.config.times(part)
            return jax.tree.map(lambda x: jnp.broadcast_to(x, (times, *x.shape)), states) if part in SCANNED else states

        return {part: make(part) for part in PARTS}

    def step(self, x_BTD: jax.Array, states: dict[str, Any], ctx: Context) -> tuple[jax.Array, dict[str, Any]]:
        def run(pair: tuple[BlockModule, Any], x: jax.Array, ctx: Context) -> tuple[jax.Array, Any, Context]:
            return pair[0].step(x, pair[1], ctx)

        x, ctx, new = self._expanded(x_BTD, ctx), self._entering(x_BTD, ctx), {}
        for part in PARTS:
            pairs = list(zip(getattr(self, part), states[part], strict=True))
            x, new[part], ctx = self._run(part, run, pairs, x, ctx)
        return self._collapsed(x, ctx), new

    def _expanded(self, x_BTD: jax.Array, ctx: Context) -> jax.Array:
        """What the first layer gets: the stream, or all streams (B, T, M, D)."""
        streams = self.config.hyper_connections
        return x_BTD if streams is None else ctx.rules.constrain(expanded(x_BTD, streams.streams), STREAMS)

    def _collapsed(self, x: jax.Array, ctx: Context) -> jax.Array:
        return x if self.collapse is None else ctx.rules.constrain(self.collapse(x), STREAM)

    def _entering(self, x_BTD: jax.Array, ctx: Context) -> Context:
        """The context in front of the first layer."""
        return dataclasses.replace(ctx, published={EMBEDDING: {"stream": x_BTD}}, shared=dict(self.shared))

    def _run(self, part: str, run: Any, items: list[Any], x: jax.Array, ctx: Context) -> tuple[jax.Array, Any, Context]:
        """`run` over the items of a part, once or by a scan.

        What was published in front of a scan is a constant of it. Of what its own layers publish, it carries what a later
        part reads, and that gets the last repeat's. A shared table that is updated by rows is read by each block through taps
        of its own.
        """
        repeats = self.config.times(part) if part in SCANNED else None
        tables = [reading(ctx.shared, f"{part}.{i}", repeats) for i in range(len(items))]
        run, items = _through_taps(run), list(zip(items, tables, strict=True))
        if repeats is None or not items:
            return _in_turn(items, x, ctx, run)
        names = dict(self.carried)[part]

        def period(carry: tuple[jax.Array, Any], items: list[Any]) -> tuple[tuple[jax.Array, Any], list[Any]]:
            x, outputs, inner = _in_turn(items, carry[0], ctx, run)
            return (x, {name: inner.published[name] for name in names}), outputs

        kept: Any = {}
        if names:
            once = jax.tree.map(lambda leaf: leaf[0], items)
            shapes = jax.eval_shape(lambda x, items: period((x, None), items)[0][1], x, once)
            kept = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        (x, kept), scanned = jax.lax.scan(period, (x, kept), items)
        return x, scanned, with_published(ctx, kept)

    def updated(self, aux: StackAux) -> "StackModule":
        """The stack with every mixer's buffers moved on by the step's aux."""
        move = lambda mixer, own: mixer.updated(own)  # noqa: E731
        return self._each(aux, lambda part: jax.vmap(move) if part in SCANNED else move)

    def within_step(self, aux: StackAux) -> "StackModule":
        """The stack for the next micro-batch of a step, given the aux summed over those before it."""
        return self._each(aux, lambda part: lambda mixer, own: mixer.within_step(own))

    def _each(self, aux: StackAux, change_in: Callable[[str], Callable[[Mixer, Any], Mixer]]) -> "StackModule":
        """A copy with each mixer changed by what its part's function makes of it and of its aux."""
        new = jax.tree.map(lambda leaf: leaf, self)
        for part in PARTS:
            change = change_in(part)
            for block, block_aux in zip(getattr(new, part), aux[part], strict=True):
                for layer, layer_aux in zip(block.sub_layers, block_aux, strict=True):
                    layer.mixer = change(layer.mixer, layer_aux)
        return new


def _through_taps(run: Any) -> Any:
    """`run` for an item together with the shared tables as it reads them."""

    def through(pair: tuple[Any, list[TapedTable]], x: jax.Array, ctx: Context) -> tuple[jax.Array, Any, Context]:
        item, tables = pair
        x, out, inner = run(item, x, dataclasses.replace(ctx, shared=with_tables(ctx.shared, tables)))
        return x, out, dataclasses.replace(inner, shared=ctx.shared)

    return through


def _in_turn(items, x, ctx, apply):
    outputs = []
    for item in items:
        x, out, ctx = apply(item, x, ctx)
        outputs.append(out)
    return x, outputs, ctx
