"""MemMamba (arXiv 2510.03279): a fading recurrence that first reads a small pool of summaries of what it may have forgotten."""

from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mlt.config.problems import Problem
from mlt.mixers import cache
from mlt.mixers.base import Aux, BuildInfo, Context, Mixer, SequenceMixerConfig
from mlt.mixers.blocks import ending_at, ends
from mlt.mixers.recurrent import Continuation, Row
from mlt.mixers.sequence.mamba import Mamba
from mlt.mixers.sizes import not_divisor, not_positive
from mlt.nn.linear import Linear
from mlt.nn.param import ones, param
from mlt.parallel import ops
from mlt.parallel.local import TOKENS


class MemMamba(SequenceMixerConfig):
    """y = memory(x + alpha r_t F c_t), where c_t reads summaries of earlier tokens by cross-token attention:

        notes       n_t = sigmoid(x_t w) (x_t N);   a summary s is the max over the n of a block of `block` tokens
        read        c_t = softmax(Q x_t . K s) V s over the last `slots` summaries;   r_t = sigmoid(x_t w_r)

    Blocks are counted from a document's start, and a summary is read from the last token of its block on. The paper inserts
    and reads where an importance passes a threshold that it does not give; here the importances are gates, which keeps
    them trainable, and every block inserts one summary. alpha is a learned number, from 1. Reads across layers are not
    part of this mixer. Decoding keeps every summary of the row, of which the last `slots` are read.

    Attributes:
        memory: the recurrence.
        summary_dim: width of notes and summaries.
        num_heads: heads of the attention, a divisor of summary_dim.
        slots: summaries that a token may read, the newest ones.
        block: tokens of a block.
        kernel: backend of the attention.
    """

    context: ClassVar[str] = "carry"
    op: ClassVar[str] = "attention"

    memory: SequenceMixerConfig = Mamba()
    summary_dim: int = 64
    num_heads: int = 4
    slots: int = 50
    block: int = 64

    def problems(self) -> Iterator[Problem]:
        sizes = list(not_positive(self, "summary_dim", "num_heads", "slots", "block"))
        yield from sizes or not_divisor(self, "num_heads", "summary_dim")
        if self.memory.context not in ("carry", "halo"):
            yield Problem("memory", type(self.memory).__name__, "is not a recurrent mixer", "use Mamba, Mamba2 or another")

    def build(self, info: BuildInfo) -> "MemMambaMixer":
        return MemMambaMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        projections = 2 * d_model * (3 * self.summary_dim + 2) + 4 * self.summary_dim**2
        read = 4 * self.summary_dim * min(self.slots, seq_len / (2 * self.block))
        return self.memory.flops_per_token(d_model, seq_len) + projections + read + self.block * self.summary_dim

    def state_size(self, d_model: int, seq_len: int) -> int:
        kept = cache.slots(seq_len, self.block) + 2 * max(seq_len // self.block, 1)
        return self.memory.state_size(d_model, seq_len) + self.summary_dim * kept

    def inactive_params(self, d_model: int) -> int:
        return self.memory.inactive_params(d_model)

    @classmethod
    def example(cls) -> tuple["MemMamba", BuildInfo]:
        config = cls(memory=Mamba(state_dim=4), summary_dim=8, num_heads=4, slots=3, block=4)
        return config, BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class MemMambaMixer(Mixer):
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

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        block, notes_BTS = self.config.block, self._notes(x_BTD)
        summarize = lambda notes: ending_at(notes, notes.shape[1], block).max(axis=2)  # noqa: E731
        summary_BTS = ops.with_left_context(summarize, ctx.rules, block - 1, (notes_BTS,), (), (*TOKENS, None))
        return self.memory(x_BTD + self._read(x_BTD, summary_BTS, Row(ctx)), ctx)

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> Any:
        config = self.config
        head = (config.num_heads, config.summary_dim // config.num_heads)
        notes = cache.empty_cache(batch, cache.slots(max_length, config.block), dtype, note=(config.summary_dim,))
        pool = cache.empty_picked(batch, max_length // config.block, dtype, key=head, value=head)
        return {"notes": notes, "pool": pool, "memory": self.memory.init_state(batch, max_length, dtype)}

    def step(self, x_BTD: jax.Array, state: Any, ctx: Context) -> tuple[jax.Array, Any]:
        config = self.config
        seen, notes = cache.extend(state["notes"], ctx, window=config.block, note=self._notes(x_BTD))
        summary_BTS = ending_at(seen["note"], x_BTD.shape[1], config.block).max(axis=2)
        segment_B = ctx.segment_ids[:, 0]
        row = Continuation({"pool": state["pool"], "segment": segment_B}, {"segment": segment_B}, ctx)
        read_BTD = self._read(x_BTD, summary_BTS, row)
        y_BTD, memory = self.memory.step(x_BTD + read_BTD, state["memory"], ctx)
        return y_BTD, {"notes": notes, "pool": row.new["pool"], "memory": memory}

    def updated(self, aux: Aux) -> "MemMambaMixer":
        new = jax.tree.map(lambda leaf: leaf, self)
        new.memory = self.memory.updated(aux)
        return new

    def _notes(self, x_BTD: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(self.importance(x_BTD)) * self.note(x_BTD)

    def _read(self, x_BTD: jax.Array, summary_BTS: jax.Array, row: Row) -> jax.Array:
        """What the pool adds to the stream; `summary` is the max over the block that would end at a token."""
        config, ctx = self.config, row.ctx
        done_BT = (ctx.positions + 1) // config.block
        read_BTNH, _ = row.attention_to_picked(
            self.query(x_BTD),
            self.key(summary_BTS),
            self.value(summary_BTS),
            picked_BT=ends(ctx.segment_ids, ctx.positions, config.block),
            spacing=config.block,
            positions=(done_BT, done_BT),
            name="pool",
            window=config.slots,
            implementation=config.kernel,
        )
        gate_BT1 = self.alpha[...].astype(x_BTD.dtype) * jax.nn.sigmoid(self.read_gate(x_BTD))
        return gate_BT1 * self.fuse(read_BTNH.astype(x_BTD.dtype))
