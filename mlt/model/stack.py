"""The stack: a head and a tail of blocks, and between them a period of blocks repeated by one `lax.scan`.

Every block of the period has its own parameters in every repeat; only the program is shared. A hybrid of any depth
therefore compiles one period, not one program per layer.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mlt.config.base import Config
from mlt.config.problems import Problem
from mlt.mixers.base import Aux, BuildInfo, Context, MixerConfig
from mlt.model.block import Block, BlockModule
from mlt.model.remat import Remat
from mlt.nn.param import stack_specs

MAX_UNROLLED = 12
StackAux = dict[str, Any]


class Stack(Config):
    """num_layers = len(head) + repeats * len(period) + len(tail).

    Attributes:
        head: unrolled blocks in front.
        period: blocks repeated by scan.
        repeats: how often.
        tail: unrolled blocks behind.
    """

    head: tuple[Block, ...] = ()
    period: tuple[Block, ...] = ()
    repeats: int = 1
    tail: tuple[Block, ...] = ()

    @property
    def num_layers(self) -> int:
        return len(self.head) + self.repeats * len(self.period) + len(self.tail)

    def layers(self) -> list[Block]:
        """Every block in depth order."""
        return [*self.head, *self.period * self.repeats, *self.tail]

    def mixers(self) -> list[MixerConfig]:
        """Every mixer in depth order."""
        return [mixer for block in self.layers() for mixer in block.mixers]

    def problems(self) -> Iterator[Problem]:
        if self.repeats < 1:
            yield Problem("repeats", self.repeats, "must be at least 1", "empty the period to have no scanned blocks")
        if not (self.head or self.period or self.tail):
            yield Problem("period", (), "the stack has no blocks")
        for name in ("head", "tail"):
            count = len(getattr(self, name))
            if count > MAX_UNROLLED:
                rule = f"holds {count} unrolled blocks; more than {MAX_UNROLLED} compile slowly"
                yield Problem(name, count, rule, "move repeating blocks into the period")

    def build(self, info: BuildInfo) -> "StackModule":
        return StackModule(self, info)


class StackModule(nnx.Module):
    def __init__(self, config: Stack, info: BuildInfo):
        self.config = config
        self.head = nnx.List([block.build(info) for block in config.head])
        self.period = nnx.List([stack_specs(block.build(info), config.repeats) for block in config.period])
        self.tail = nnx.List([block.build(info) for block in config.tail])

    def __call__(self, x_BTD: jax.Array, ctx: Context, remat: Remat) -> tuple[jax.Array, StackAux]:
        def run(x: jax.Array, blocks: list[BlockModule], in_loop: bool = False) -> tuple[jax.Array, list[list[Aux]]]:
            return _run(blocks, x, lambda block, x: block(x, ctx, remat, in_loop=in_loop))

        period = functools.partial(run, in_loop=self.config.repeats > 1)
        x_BTD, head = run(x_BTD, list(self.head))
        x_BTD, scanned = jax.lax.scan(period, x_BTD, list(self.period)) if self.period else (x_BTD, [])
        x_BTD, tail = run(x_BTD, list(self.tail))
        return x_BTD, {"head": head, "period": scanned, "tail": tail}

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> dict[str, Any]:
        """Decoding state of every layer; that of the period is stacked over repeats."""
        make = lambda blocks: [block.init_state(batch, max_length, dtype) for block in blocks]  # noqa: E731
        repeat = lambda value: jnp.broadcast_to(value, (self.config.repeats, *value.shape))  # noqa: E731
        return {"head": make(self.head), "period": jax.tree.map(repeat, make(self.period)), "tail": make(self.tail)}

    def step(self, x_BTD: jax.Array, states: dict[str, Any], ctx: Context) -> tuple[jax.Array, dict[str, Any]]:
        def period(x: jax.Array, pair: tuple[list[BlockModule], list[Any]]) -> tuple[jax.Array, list[Any]]:
            pairs = list(zip(*pair, strict=True))
            return _run(pairs, x, lambda pair, x: pair[0].step(x, pair[1], ctx))

        x_BTD, head = period(x_BTD, (list(self.head), states["head"]))
        pair = (list(self.period), states["period"])
        x_BTD, scanned = jax.lax.scan(period, x_BTD, pair) if self.period else (x_BTD, [])
        x_BTD, tail = period(x_BTD, (list(self.tail), states["tail"]))
        return x_BTD, {"head": head, "period": scanned, "tail": tail}

    def updated(self, aux: StackAux) -> "StackModule":
        """The stack with every mixer's buffers moved on by the step's aux."""
        new = jax.tree.map(lambda leaf: leaf, self)
        for part in ("head", "period", "tail"):
            for block, block_aux in zip(getattr(new, part), aux[part], strict=True):
                for layer, layer_aux in zip(block.sub_layers, block_aux, strict=True):
                    move = lambda mixer, a: mixer.updated(a)  # noqa: E731
                    layer.mixer = (jax.vmap(move) if part == "period" else move)(layer.mixer, layer_aux)
        return new


def _run(items, x, apply):
    outputs = []
    for item in items:
        x, out = apply(item, x)
        outputs.append(out)
    return x, outputs
