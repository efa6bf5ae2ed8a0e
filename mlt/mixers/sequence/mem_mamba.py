"""MemMamba (arXiv 2510.03279): a fading recurrence that first reads a small pool of summaries of what it may have forgotten."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from mlt_kernels.attention import merge

from mlt.config.problems import Problem
from mlt.mixers import cache
from mlt.mixers.base import (
    AroundMemory,
    Arrays,
    Aux,
    BuildInfo,
    Context,
    MixerConfig,
    Part,
    Published,
    SequenceMixerConfig,
    exchanging,
)
from mlt.mixers.blocks import ending_at, ends
from mlt.mixers.recurrent import Continuation, Row
from mlt.mixers.sequence.mamba import Mamba
from mlt.mixers.sequence.short_conv import ShortConv
from mlt.mixers.sizes import not_divisor, not_positive
from mlt.nn.linear import Linear
from mlt.nn.param import ones, param
from mlt.parallel import ops
from mlt.parallel.local import TOKENS


class MemMamba(SequenceMixerConfig):
    """y = memory(x + alpha r_t F c_t + beta G e_t), where c_t reads summaries of earlier tokens by cross-token attention, and e_t
    those that earlier layers made of them, by cross-layer attention:

        notes       n_t = sigmoid(x_t w) (x_t N);   a summary s is the max over the n of a block of `block` tokens
        read        c_t = softmax(Q x_t . K s) V s over the last `slots` summaries;   r_t = sigmoid(x_t w_r)
        layers      e_t = the same with projections of its own, over the last `slots` summaries of each of the `sources`

    Blocks are counted from a document's start, and a summary is read from the last token of its block on. The paper inserts
    and reads where an importance passes a threshold that it does not give; here the importances are gates, which keeps
    them trainable, and every block inserts one summary. alpha and beta are learned numbers, from 1. Which layers read which is
    said by names: the paper's every p-th layer reads those of the g layers in front of it, p and g not stated. Decoding keeps
    every summary of the row, of which the last `slots` are read.

    Attributes:
        memory: the recurrence.
        summary_dim: width of notes and summaries.
        num_heads: heads of the attention, a divisor of summary_dim.
        slots: summaries that a token may read, the newest ones.
        block: tokens of a block.
        publish: name under which later layers may read this layer's summaries; None publishes nothing.
        sources: names of summaries of earlier layers, of the same width and blocks, that this layer reads.
        kernel: backend of the attention.
    """

    context: ClassVar[str] = "carry"
    op: ClassVar[str] = "attention"

    memory: SequenceMixerConfig = Mamba()
    summary_dim: int = 64
    num_heads: int = 4
    slots: int = 50
    block: int = 64
    publish: str | None = None
    sources: tuple[str, ...] = ()

    def problems(self) -> Iterator[Problem]:
        sizes = list(not_positive(self, "summary_dim", "num_heads", "slots", "block"))
        yield from sizes or not_divisor(self, "num_heads", "summary_dim")
        if len(set(self.sources)) < len(self.sources):
            yield Problem("sources", self.sources, "names a layer's summaries twice", "name each once")
        if self.memory.context not in ("carry", "halo"):
            yield Problem("memory", type(self.memory).__name__, "is not a recurrent mixer", "use Mamba, Mamba2 or another")

    def build(self, info: BuildInfo) -> "MemMambaMixer":
        return MemMambaMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        projections = 2 * d_model * (3 * self.summary_dim + 2) + 4 * self.summary_dim**2
        read = 4 * self.summary_dim * min(self.slots, seq_len / (2 * self.block)) * (1 + len(self.sources))
        if self.sources:
            projections += 4 * d_model * self.summary_dim + 4 * len(self.sources) * self.summary_dim**2
        return self.memory.flops_per_token(d_model, seq_len) + projections + read + self.block * self.summary_dim

    def state_size(self, d_model: int, seq_len: int) -> int:
        kept = cache.slots(seq_len, self.block) + 2 * max(seq_len // self.block, 1) * (1 + len(self.sources))
        return self.memory.state_size(d_model, seq_len) + self.summary_dim * kept

    def inactive_params(self, d_model: int) -> int:
        return self.memory.inactive_params(d_model)

    def publishes(self, d_model: int) -> Mapping[str, Published]:
        return {} if self.publish is None else {self.publish: self._parts()}

    def reads(self, d_model: int) -> Mapping[str, Published]:
        return {name: self._parts() for name in self.sources}

    def _parts(self) -> Published:
        """For each token the summary of the `block` tokens up to it, which is one of the pool where a block ends."""
        return {f"summary of {self.block} tokens": Part((self.summary_dim,), (None,))}

    @classmethod
    def example(cls) -> tuple["MemMamba", BuildInfo]:
        config = cls(memory=Mamba(state_dim=4), summary_dim=8, num_heads=4, slots=3, block=4, sources=("notes",))
        return config, BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)

    @classmethod
    def example_publishers(cls) -> tuple[MixerConfig, ...]:
        return (cls(memory=ShortConv(), summary_dim=8, num_heads=4, slots=3, block=4, publish="notes"),)


class MemMambaMixer(AroundMemory):
    def __init__(self, config: MemMamba, info: BuildInfo):
        self.config = config
        heads = (("heads", config.num_heads), ("head_dim", config.summary_dim // config.num_heads))
        stream, summary, one = (("embed", info.d_model),), ((None, config.summary_dim),), ((None, 1),)
        self.memory = config.memory.build(info)
        self.note = Linear(stream, summary)
        self.importance = Linear(stream, one)
        self.query = Linear(stream, heads)
        self.key = Linear(summary, heads)
        self.value = Linear(summary, heads)
        self.fuse = Linear(heads, stream)
        self.read_gate = Linear(stream, one)
        self.alpha = param((1,), (None,), ones)
        self.layers = CrossLayerRead(config, info) if config.sources else None

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        return self.call_and_publish(x_BTD, ctx)[:2]

    def call_and_publish(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux, dict[str, Arrays]]:
        block, notes_BTS = self.config.block, self._notes(x_BTD)
        summarize = lambda notes: ending_at(notes, notes.shape[1], block).max(axis=2)  # noqa: E731
        summary_BTS = ops.with_left_context(summarize, ctx.rules, block - 1, (notes_BTS,), (), (*TOKENS, None))
        y_BTD, aux = self.memory(x_BTD + self._read(x_BTD, summary_BTS, Row(ctx)), exchanging(ctx, self.config.memory.exchange))
        return y_BTD, aux, self._published(summary_BTS)

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> Any:
        config = self.config
        head = (config.num_heads, config.summary_dim // config.num_heads)
        notes = cache.empty_cache(batch, cache.slots(max_length, config.block), dtype, note=(config.summary_dim,))
        pool = lambda: cache.empty_picked(batch, max_length // config.block, dtype, key=head, value=head)  # noqa: E731
        pools = {name: pool() for name in ("pool", *config.sources)}
        return {"notes": notes, "pools": pools, "memory": self.memory.init_state(batch, max_length, dtype)}

    def step(self, x_BTD: jax.Array, state: Any, ctx: Context) -> tuple[jax.Array, Any]:
        return self.step_and_publish(x_BTD, state, ctx)[:2]

    def step_and_publish(self, x_BTD: jax.Array, state: Any, ctx: Context) -> tuple[jax.Array, Any, dict[str, Arrays]]:
        config = self.config
        seen, notes = cache.extend(state["notes"], ctx, window=config.block, note=self._notes(x_BTD))
        summary_BTS = ending_at(seen["note"], x_BTD.shape[1], config.block).max(axis=2)
        segment_B = ctx.segment_ids[:, 0]
        row = Continuation({**state["pools"], "segment": segment_B}, {"segment": segment_B}, ctx)
        read_BTD = self._read(x_BTD, summary_BTS, row)
        y_BTD, memory = self.memory.step(x_BTD + read_BTD, state["memory"], ctx)
        pools = {name: row.new[name] for name in state["pools"]}
        return y_BTD, {"notes": notes, "pools": pools, "memory": memory}, self._published(summary_BTS)

    def _notes(self, x_BTD: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(self.importance(x_BTD)) * self.note(x_BTD)

    def _published(self, summary_BTS: jax.Array) -> dict[str, Arrays]:
        config = self.config
        return {} if config.publish is None else {config.publish: dict.fromkeys(config._parts(), summary_BTS)}

    def _read(self, x_BTD: jax.Array, summary_BTS: jax.Array, row: Row) -> jax.Array:
        """What the pools add to the stream; `summary` is the max over the block that would end at a token."""
        read_BTNH, _ = _attend(self.config, row, self.query(x_BTD), self.key(summary_BTS), self.value(summary_BTS), "pool")
        gate_BT1 = self.alpha[...] * jax.nn.sigmoid(self.read_gate(x_BTD))
        read_BTD = (gate_BT1 * self.fuse(read_BTNH.astype(x_BTD.dtype))).astype(x_BTD.dtype)
        return read_BTD if self.layers is None else read_BTD + self.layers(x_BTD, row)


class CrossLayerRead(nnx.Module):
    """beta G e_t: one softmax over the summaries of all sources."""

    def __init__(self, config: MemMamba, info: BuildInfo):
        self.config = config
        heads = (("heads", config.num_heads), ("head_dim", config.summary_dim // config.num_heads))
        stream, summary = (("embed", info.d_model),), ((None, config.summary_dim),)
        self.query = Linear(stream, heads)
        self.key = Linear(summary, heads)
        self.value = Linear(summary, heads)
        self.fuse = Linear(heads, stream)
        self.beta = param((1,), (None,), ones)

    def __call__(self, x_BTD: jax.Array, row: Row) -> jax.Array:
        q_BTNH, parts = self.query(x_BTD), []
        for name in self.config.sources:
            (summary_BTS,) = row.ctx.published[name].values()
            parts.append(_attend(self.config, row, q_BTNH, self.key(summary_BTS), self.value(summary_BTS), name))
        read_BTNH, _ = merge(parts)
        return (self.beta[...] * self.fuse(read_BTNH.astype(x_BTD.dtype))).astype(x_BTD.dtype)


def _attend(config, row, q_BTNH, k_BTNH, v_BTNH, name):
    """(read, log-sum-exp) of the last `slots` summaries that are there at each token."""
    ctx = row.ctx
    done_BT = (ctx.positions + 1) // config.block
    return row.attention_to_picked(
        q_BTNH,
        k_BTNH,
        v_BTNH,
        picked_BT=ends(ctx.segment_ids, ctx.positions, config.block),
        spacing=config.block,
        positions=(done_BT, done_BT),
        name=name,
        window=config.slots,
        implementation=config.kernel,
    )
