"""Memory Caching (arXiv 2602.24281): a recurrence that keeps its state at the end of every segment, and reads them all."""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import mlt_kernels

from mlt.config.problems import Problem
from mlt.errors import UserError
from mlt.mixers import cache
from mlt.mixers.base import BuildInfo, SequenceMixerConfig, save_point
from mlt.mixers.closed_blocks import Blocks, at_ends, closed_blocks, front_of_shard, gather, members, visible
from mlt.mixers.recurrent import Continuation, RecurrentMixer, Row
from mlt.mixers.sequence.gated_delta import GatedDelta
from mlt.mixers.sizes import not_positive
from mlt.nn.linear import Linear
from mlt.nn.param import fan_in
from mlt.parallel import sequence
from mlt.parallel.local import CHANNELS, HEADS, KV_HEADS, Q_HEADS, STREAM, TOKENS, local


class MemoryCaching(SequenceMixerConfig):
    """In place of S_t^T q_t, where S is the state of the recurrence `memory`, with S^(i) its state at the end of segment i:

        y_t = g_s S_t^T q_t + sum over earlier segments i of the document g_i (S^(i))^T q_t

        residual    g = 1
        gated       g = softmax over the earlier segments and the current one s of <u_t, z_i>         (the paper's GRM)
        soup        y_t = (g_s S_t + sum g_i S^(i))^T q_t: for states that are matrices, as here, the same function
        sparse      gated, but of the earlier segments only the `selected` with the largest <u_t, z_i>    (SSC)

    u = x W_u; z_i is the mean of the segment's x, that of the current segment over its tokens so far. Segments have
    `segment` tokens, counted from the start of a document. `independent` segments start from an empty state, so that each
    holds its own tokens alone; otherwise the state goes on and S^(i) holds everything up to its end. All of `memory` but its
    recurrence is as it is: projections, convolutions, gates, norms.

    Attributes:
        memory: any mixer of a plain linear recurrence (GatedDelta, KimiDelta, Mamba2, GatedLinearAttention, ...).
        segment: tokens of a segment (C).
        variant: what g is.
        independent: whether a segment starts from nothing.
        selected: earlier segments that "sparse" reads.
    """

    context: ClassVar[str] = "carry"

    memory: SequenceMixerConfig
    segment: int = 256
    variant: Literal["residual", "gated", "soup", "sparse"] = "gated"
    independent: bool = True
    selected: int = 8

    def problems(self) -> Iterator[Problem]:
        yield from not_positive(self, "segment", "selected")
        if self.memory.op != "linear_recurrence":
            name = type(self.memory).__name__
            yield Problem("memory", name, "has no matrix state to keep", "use GatedDelta, Mamba2, KimiDelta or another")
        if self.kernel is not None:
            yield Problem("kernel", self.kernel, "must be None", "set memory.kernel")
        if self.memory.exchange is not None:
            yield Problem("memory.exchange", self.memory.exchange, "is the layer's to say", "set exchange")

    def whole_rows(self) -> str | None:
        return None if self.independent else "set its independent=True"

    def build(self, info: BuildInfo) -> "MemoryCachingMixer":
        return MemoryCachingMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        segments, values = seq_len / (2 * self.segment), self._values(d_model)
        gates = 0 if self.variant == "residual" else 2 * d_model * d_model + 2 * d_model * (segments + 1)
        # Every token is written twice: in its row, and to the end of its segment.
        return self.memory.flops_per_token(d_model, seq_len) + gates + 4 * values + 2 * values * segments

    def state_size(self, d_model: int, seq_len: int) -> int:
        kept = max(seq_len // self.segment, 1) * (self._values(d_model) + d_model)
        return self.memory.state_size(d_model, seq_len) + d_model + kept

    def _values(self, d_model: int) -> int:
        """Values of the recurrence's state."""
        memory = self.memory.build(BuildInfo(d_model=d_model, num_sub_layers=1, vocab_size=1))
        return jax.eval_shape(lambda: memory.init_state(1, 1, jnp.dtype("float32"))["memory"]).size

    @classmethod
    def example(cls) -> tuple["MemoryCaching", BuildInfo]:
        memory = GatedDelta(num_heads=4, num_key_heads=2, key_dim=8, value_dim=16, conv_width=2)
        return cls(memory=memory, segment=6), BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class MemoryCachingMixer(RecurrentMixer):
    def __init__(self, config: MemoryCaching, info: BuildInfo):
        self.config = config
        memory = config.memory.build(info)
        if not isinstance(memory, RecurrentMixer) or type(memory).__call__ is not RecurrentMixer.__call__:
            raise UserError(
                f"MemoryCaching: memory = {type(config.memory).__name__} is more than one recurrence of a row; "
                "use GatedDelta, Mamba2, KimiDelta or another"
            )
        self.memory = memory
        self.width = info.d_model
        stream = (("embed", info.d_model),)
        # Scores of unit inputs start near one.
        init = fan_in(info.d_model, scale=info.d_model**-0.5)
        self.gate = None if config.variant == "residual" else Linear(stream, ((None, info.d_model),), init=init)

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> Any:
        state = self.memory.init_state(batch, max_length, dtype)
        shapes = {"state": state["memory"].shape[1:], **({} if self.gate is None else {"mean": (self.width,)})}
        kept = cache.empty_picked(batch, max_length // self.config.segment, jnp.dtype("float32"), **shapes)
        sums = {} if self.gate is None else {"sum": jnp.zeros((batch, self.width), jnp.float32)}
        return {**state, **sums, "segments": kept}

    def mix(self, x_BTD: jax.Array, row: Row) -> jax.Array:
        return self.memory.mix(x_BTD, _CachingRow(row, self, x_BTD))  # pyright: ignore[reportArgumentType]


class _CachingRow:
    """The row of the memory, with a recurrence that also reads the ends of earlier segments."""

    def __init__(self, row: Row, mixer: MemoryCachingMixer, x_BTD: jax.Array):
        self.row, self.ctx, self.config = row, row.ctx, mixer.config
        self.place_BT, self.number_BT = row.ctx.positions % self.config.segment, row.ctx.positions // self.config.segment
        self.query_BTD = self.mean_BTD = None
        if mixer.gate is not None:
            self.query_BTD = mixer.gate(x_BTD).astype(jnp.float32)
            keep_BTD = jnp.broadcast_to(jnp.where(self.place_BT == 0, 0.0, 1.0)[..., None], x_BTD.shape)
            sum_BTD = row.diagonal_recurrence(keep_BTD, x_BTD.astype(jnp.float32), name="sum")
            self.mean_BTD = sum_BTD / (self.place_BT + 1.0)[..., None]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.row, name)

    def linear_recurrence(self, q: jax.Array, k: jax.Array, v: jax.Array, *, name: str = "memory", **options: Any) -> jax.Array:
        rules, row = self.ctx.rules, self.row
        if not self.config.independent and rules.size("seq") > 1:
            raise UserError(
                f"mesh.context = {rules.size('seq')}: memory caching with independent=False needs whole sequences; use "
                "independent=True or mesh.context=1"
            )
        gates = {"log_decay": options.pop("log_decay", None), "beta": options.pop("beta", None)}
        entering, kept = (row.state[name], row.state["segments"]) if isinstance(row, Continuation) else (None, None)
        o_BTHV, last = self._within(q, k, v, entering, gates | options)

        def run(o, q, k, v, log_decay, beta, query, mean, segments, positions):
            tokens: Any = (k, v, log_decay, beta, mean, segments, positions)
            if rules.size("seq") > 1:
                tokens = front_of_shard(tokens, self.config.segment - 1, rules.size("seq"))
            closed = self._closed(tokens, entering, options)
            if rules.size("seq") > 1:
                closed = jax.tree.map(lambda x: jax.lax.all_gather(x, sequence.AXIS, axis=1, tiled=True), closed)
            new = closed
            if kept is not None:
                new = cache.pick(closed["segment"] != 0, kept, **closed)
            return self._read(o, q, query, mean, segments, positions, new, options), new

        gate = {1: HEADS, 3: CHANNELS, 4: Q_HEADS}[getattr(gates["log_decay"], "ndim", 1)]
        inputs = (Q_HEADS, KV_HEADS, KV_HEADS, Q_HEADS, gate, CHANNELS, STREAM, STREAM, TOKENS, TOKENS)
        arrays: Any = (o_BTHV, q, k, v, *gates.values(), self.query_BTD, self.mean_BTD, self.ctx.segment_ids, self.ctx.positions)
        if isinstance(row, Continuation):
            o_BTHV, row.new["segments"] = run(*arrays)
            row.new[name] = last
            return o_BTHV
        return local(lambda *parts: run(*parts)[0], rules, inputs, Q_HEADS)(*arrays)

    def _within(self, q, k, v, entering, options):
        """What the recurrence of the current segment answers, and where it stops."""
        segments = self.ctx.segment_ids
        if self.config.independent:
            # One id for each segment of each document, so that the state starts over.
            first_BT = (self.place_BT == 0) & (segments != 0)
            segments = jnp.where(segments == 0, 0, 1 + jnp.cumsum(first_BT, axis=1, dtype=jnp.int32))
        if entering is None:
            inner = Row(dataclasses.replace(self.ctx, segment_ids=segments))
            return inner.linear_recurrence(q, k, v, **options), None
        if self.config.independent:
            entering = jnp.where((self.place_BT[:, 0] == 0)[:, None, None, None], 0.0, entering)
        given = {"segment_ids": segments, "initial_state": entering, "return_final_state": True}
        return mlt_kernels.linear_recurrence(q, k, v, **given, **options)

    def _closed(self, tokens, entering, options):
        """State and mean at the end of each segment that ends here, with its document and its number in it."""
        k, v, log_decay, beta, mean, segments, positions = tokens
        size, length = self.config.segment, k.shape[1]
        blocks = closed_blocks(segments, positions, size)
        index_BJC, there_BJC = members(blocks, length, size)
        if log_decay is not None and log_decay.ndim == 1:
            log_decay = jnp.broadcast_to(log_decay, (*k.shape[:2], *log_decay.shape))
        # Tokens in front of the row neither decay nor write; what they did is in the entering state.
        there = lambda x: jnp.where(there_BJC.reshape(*there_BJC.shape, *[1] * (x.ndim - 3)), x, jnp.zeros((), x.dtype))  # noqa: E731
        inputs = {"k": there(gather(k, index_BJC)), "v": gather(v, index_BJC)}
        if log_decay is not None:
            inputs["log_decay"] = there(gather(log_decay, index_BJC))
        if beta is not None:
            inputs["beta"] = gather(beta, index_BJC)
        began_BJ = there_BJC[..., -1] & ~there_BJC[..., 0]
        if entering is None:
            entering = jnp.zeros((v.shape[0], v.shape[2], k.shape[-1], v.shape[-1]), jnp.float32)

        def finish(start, parts):
            given = {**options, **parts, "initial_state": start, "return_final_state": True}
            k, v = given.pop("k"), given.pop("v")
            return mlt_kernels.linear_recurrence(k, k, v, **given)[1]

        if self.config.independent:
            start = jnp.where(began_BJ[..., None, None, None], entering[:, None], 0.0)
            flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
            state_BJHKV = finish(flat(start), jax.tree.map(flat, inputs)).reshape(start.shape)
        else:
            new_BJ = (blocks.number == 0) & ~began_BJ

            def body(state, column):
                parts, new_B = column
                state = finish(jnp.where(new_B[:, None, None, None], 0.0, state), parts)
                return state, state

            columns = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (inputs, new_BJ))
            state_BJHKV = jnp.moveaxis(jax.lax.scan(body, entering, columns)[1], 0, 1)
        means = {} if mean is None else {"mean": at_ends(mean, blocks)}
        return {"state": state_BJHKV, **means, "segment": blocks.segment, "position": blocks.number}

    def _read(self, o_BTHV, q_BTHK, query_BTD, mean_BTD, segments, positions, closed, options):
        number_BT = positions // self.config.segment
        seen_BTJ = visible(Blocks(closed["segment"], closed["segment"], closed["position"]), segments, number_BT)
        own_BT, weight_BTJ = self._weights(query_BTD, mean_BTD, closed.get("mean"), seen_BTJ)
        scale = options.get("scale")
        q = q_BTHK.astype(jnp.float32) * (q_BTHK.shape[-1] ** -0.5 if scale is None else scale)
        q_BTHK = jnp.repeat(q, o_BTHV.shape[2] // q.shape[2], axis=2)

        def body(total, part):
            state_BHKV, weight_BT = part
            return total + weight_BT[..., None, None] * jnp.einsum("bthk,bhkv->bthv", q_BTHK, state_BHKV), None

        columns = (jnp.moveaxis(closed["state"], 1, 0), jnp.moveaxis(weight_BTJ, 2, 0))
        start = own_BT[..., None, None] * o_BTHV.astype(jnp.float32)
        total, _ = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), start, columns)
        return save_point(total.astype(o_BTHV.dtype), "recurrence_out")

    def _weights(self, query_BTD, mean_BTD, mean_BJD, seen_BTJ):
        """g of the current segment (B, T), and of the closed ones (B, T, J), zero where a token does not see them."""
        if query_BTD is None:
            return jnp.ones(seen_BTJ.shape[:2]), jnp.where(seen_BTJ, 1.0, 0.0)
        with jax.default_matmul_precision("highest"):
            score_BTJ = jnp.einsum("btd,bjd->btj", query_BTD, mean_BJD)
        if self.config.variant == "sparse" and self.config.selected < seen_BTJ.shape[-1]:
            best = jax.lax.top_k(jnp.where(seen_BTJ, score_BTJ, -jnp.inf), self.config.selected)[1]
            seen_BTJ &= jnp.any(best[..., None] == jnp.arange(seen_BTJ.shape[-1]), axis=2)
        own_BT = jnp.sum(query_BTD * mean_BTD, axis=-1)
        score_BTJ = jnp.where(seen_BTJ, score_BTJ, own_BT[..., None])
        top_BT = jax.lax.stop_gradient(jnp.maximum(own_BT, jnp.max(score_BTJ, axis=-1)))
        share_BTJ = jnp.where(seen_BTJ, jnp.exp(score_BTJ - top_BT[..., None]), 0.0)
        share_BT = jnp.exp(own_BT - top_BT)
        total_BT = share_BT + jnp.sum(share_BTJ, axis=-1)
        return share_BT / total_BT, share_BTJ / total_BT[..., None]
