"""HCAM (arXiv 2105.14039): attention inside a few chunks of the past, which are found by their summaries first."""

from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mlt.config.problems import Problem
from mlt.mixers import cache
from mlt.mixers.base import BuildInfo, SequenceMixerConfig, save_point
from mlt.mixers.closed_blocks import Blocks, at_ends, closed_blocks, front_of_shard, gather, members, visible
from mlt.mixers.recurrent import Continuation, RecurrentMixer, Row, empty_state
from mlt.mixers.sizes import not_positive
from mlt.nn.linear import Linear
from mlt.nn.param import fan_in
from mlt.nn.rope import apply_rope
from mlt.parallel import sequence
from mlt.parallel.local import Q_HEADS, TOKENS, local

SUMMARY = (*TOKENS, None)


class HCAM(SequenceMixerConfig):
    """y = W_o (softmax attention to the last `window` tokens + sum over chosen chunks i of r_i attention inside chunk i):

        s_i = W_s (mean of the chunk's x),   r = softmax over the `selected` chunks with the largest (W_r x_t) . s_i / sqrt(R)

    Chunks have `chunk` tokens, are counted from the start of a document, and are read from the token after their last on.
    Each chosen chunk has a softmax of its own: its tokens compete with each other, and chunks compete by r, which is how
    the choice learns from the loss. With `chunk_positions` a sinusoid of the distance to the chunk's end is added to x in
    front of its keys and values. Queries, keys and values are those of the local attention; rotary positions are for it
    alone. As in the paper, no gradient flows into the past (x of keys, values and means) where `stop_gradient` is set.

    HSA (arXiv 2504.16795) is HCAM(stop_gradient=False, chunk_positions=False), its sliding window being `window`.

    Attributes:
        num_heads: heads (N).
        head_dim: width of a head (H).
        chunk: tokens of a chunk (C).
        selected: chunks that a token reads.
        summary_dim: width of summaries (R); None means head_dim.
        window: tokens of the local attention, the query's included; None means chunk.
        stop_gradient: whether the past is constant to the gradient.
        chunk_positions: whether tokens of a chunk know their place in it.
        rope_base: base of the rotary embedding of the local attention; None leaves positions out.
        kernel: backend of the local attention.
    """

    context: ClassVar[str] = "carry"
    op: ClassVar[str] = "attention"

    num_heads: int
    head_dim: int
    chunk: int = 64
    selected: int = 8
    summary_dim: int | None = None
    window: int | None = None
    stop_gradient: bool = True
    chunk_positions: bool = True
    rope_base: float | None = 10_000.0

    @property
    def summaries(self) -> int:
        return self.summary_dim or self.head_dim

    @property
    def local_window(self) -> int:
        return self.window or self.chunk

    def problems(self) -> Iterator[Problem]:
        yield from not_positive(self, "num_heads", "head_dim", "chunk", "selected", "summary_dim", "window")
        if self.rope_base is not None and (self.rope_base <= 0 or self.head_dim % 2):
            yield Problem("rope_base", self.rope_base, "must be positive, and head_dim even", "None turns positions off")

    def build(self, info: BuildInfo) -> "HCAMMixer":
        return HCAMMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        width, chunks = self.num_heads * self.head_dim, seq_len / (2 * self.chunk)
        again = 2 if self.stop_gradient else 0
        projections = 2 * d_model * ((4 + again) * width + 2 * self.summaries)
        seen = min(self.local_window, seq_len)
        seen -= seen * (seen - 1) / (2 * seq_len)
        # Every chunk is scored inside, and the chosen ones count.
        return projections + 4 * width * (seen + chunks * self.chunk) + 2 * self.summaries * chunks

    def state_size(self, d_model: int, seq_len: int) -> int:
        tokens = cache.slots(seq_len, self.local_window) + seq_len
        chunks = max(seq_len // self.chunk, 1)
        return 2 * tokens * self.num_heads * self.head_dim + chunks * self.summaries + self.summaries

    @classmethod
    def example(cls) -> tuple["HCAM", BuildInfo]:
        config = cls(num_heads=2, head_dim=8, chunk=5, selected=2, window=4)
        return config, BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class HCAMMixer(RecurrentMixer):
    def __init__(self, config: HCAM, info: BuildInfo):
        self.config, self.width = config, info.d_model
        d, n, h, r = info.d_model, config.num_heads, config.head_dim, config.summaries
        stream, heads, summary = (("embed", d),), (("heads", n), ("head_dim", h)), ((None, r),)
        self.query = Linear(stream, heads)
        self.key = Linear(stream, heads)
        self.value = Linear(stream, heads)
        self.summary = Linear(stream, summary)
        self.search = Linear(stream, summary)
        self.output = Linear(heads, stream, init=fan_in(n * h, scale=info.residual_scale))

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> Any:
        config = self.config
        heads = (config.num_heads, config.head_dim)
        recent = cache.empty_cache(batch, cache.slots(max_length, config.local_window), dtype, key=heads, value=heads)
        tokens = cache.empty_cache(batch, max_length, dtype, key=heads, value=heads)
        chunks = cache.empty_picked(batch, max_length // config.chunk, jnp.dtype("float32"), summary=(config.summaries,))
        return empty_state(batch, dtype, sum=(config.summaries,), recent=recent, tokens=tokens, chunks=chunks)

    def mix(self, x_BTD: jax.Array, row: Row) -> jax.Array:
        config, positions = self.config, row.ctx.positions
        past_BTD = jax.lax.stop_gradient(x_BTD) if config.stop_gradient else x_BTD
        q, k, v = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        past_k, past_v = (self.key(past_BTD), self.value(past_BTD)) if config.stop_gradient else (k, v)
        if config.chunk_positions:
            place_BTD = sinusoid(config.chunk - 1 - positions % config.chunk, self.width).astype(x_BTD.dtype)
            past_k, past_v = past_k + self.key(place_BTD), past_v + self.value(place_BTD)
        near_q, near_k = q, k
        if config.rope_base is not None:
            near_q, near_k = (apply_rope(x, positions, base=config.rope_base) for x in (q, k))
        near_q, near_k, v, q, past_k, past_v = (save_point(x, "attention_qkv") for x in (near_q, near_k, v, q, past_k, past_v))
        near_BTNH = row.attention(near_q, near_k, v, window=config.local_window, implementation=config.kernel)
        far_BTNH = self._far(row, q, past_k, past_v, self.search(x_BTD), self._running_mean(past_BTD, row))
        return self.output(save_point(near_BTNH + far_BTNH, "attention_out"))

    def _running_mean(self, past_BTD: jax.Array, row: Row) -> jax.Array:
        """W_s times the mean of the chunk's tokens so far, (B, T, R) float32."""
        place_BT1 = (row.ctx.positions % self.config.chunk)[..., None]
        summary_BTR = self.summary(past_BTD).astype(jnp.float32)
        keep_BTR = jnp.broadcast_to(jnp.where(place_BT1 == 0, 0.0, 1.0), summary_BTR.shape)
        return row.diagonal_recurrence(keep_BTR, summary_BTR, name="sum") / (place_BT1 + 1.0)

    def _far(self, row: Row, q, k, v, search, mean) -> jax.Array:
        """What the chosen chunks answer, (B, T, N, H)."""
        ctx, size = row.ctx, self.config.chunk
        if isinstance(row, Continuation):
            fresh = closed_blocks(ctx.segment_ids, ctx.positions, size)
            new = {"summary": at_ends(mean, fresh), "segment": fresh.segment, "position": fresh.number}
            row.new["chunks"] = chunks = cache.pick(fresh.segment != 0, row.state["chunks"], **new)
            seen, row.new["tokens"] = cache.extend(row.state["tokens"], ctx, key=k, value=v)
            blocks = closed_blocks(seen["segment"], seen["position"], size)
            summary_BJR = jnp.pad(chunks["summary"], ((0, 0), (0, blocks.end.shape[1] - chunks["summary"].shape[1]), (0, 0)))
            index_BJC, _ = members(blocks, seen["key"].shape[1], size)
            parts = (gather(seen["key"], index_BJC), gather(seen["value"], index_BJC), summary_BJR)
            return self._attend(q, search, ctx.segment_ids, ctx.positions, blocks, parts)
        shards = ctx.rules.size("seq")

        def run(q, k, v, search, mean, segments, positions):
            own = (segments, positions)
            tokens = (k, v, mean, segments, positions)
            if shards > 1:
                tokens = front_of_shard(tokens, size - 1, shards)
            k, v, mean, segments, positions = tokens
            blocks = closed_blocks(segments, positions, size)
            index_BJC, _ = members(blocks, k.shape[1], size)
            found: Any = (blocks, (gather(k, index_BJC), gather(v, index_BJC), at_ends(mean, blocks)))
            if shards > 1:
                found = jax.tree.map(lambda x: jax.lax.all_gather(x, sequence.AXIS, axis=1, tiled=True), found)
            return self._attend(q, search, *own, *found)

        inputs = (Q_HEADS, Q_HEADS, Q_HEADS, SUMMARY, SUMMARY, TOKENS, TOKENS)
        return local(run, ctx.rules, inputs, Q_HEADS)(q, k, v, search, mean, ctx.segment_ids, ctx.positions)

    def _attend(self, q_BTNH, search_BTR, segments_BT, positions_BT, blocks: Blocks, parts) -> jax.Array:
        k_BJCNH, v_BJCNH, summary_BJR = parts
        seen_BTJ = visible(blocks, segments_BT, positions_BT // self.config.chunk)
        with jax.default_matmul_precision("highest"):
            score_BTJ = jnp.einsum("btr,bjr->btj", search_BTR.astype(jnp.float32), summary_BJR) * self.config.summaries**-0.5
        weight_BTJ = chosen_softmax(score_BTJ, seen_BTJ, self.config.selected)

        def body(total_BTNH, part):
            k_BCNH, v_BCNH, weight_BT = part
            x_BTNC = jnp.einsum("btnh,bcnh->btnc", q_BTNH, k_BCNH, preferred_element_type=jnp.float32)
            p_BTNC = jax.nn.softmax(x_BTNC * self.config.head_dim**-0.5, axis=-1)
            o_BTNH = jnp.einsum("btnc,bcnh->btnh", p_BTNC.astype(v_BCNH.dtype), v_BCNH, preferred_element_type=jnp.float32)
            return total_BTNH + jnp.where(weight_BT == 0, 0.0, weight_BT)[..., None, None] * o_BTNH, None

        columns = tuple(jnp.moveaxis(x, 1, 0) for x in (k_BJCNH, v_BJCNH, jnp.swapaxes(weight_BTJ, 1, 2)))
        start = jnp.zeros(q_BTNH.shape, jnp.float32)
        total, _ = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), start, columns)
        return total.astype(q_BTNH.dtype)


def chosen_softmax(score_BTJ: jax.Array, seen_BTJ: jax.Array, count: int) -> jax.Array:
    """Softmax over the `count` largest scores that are seen; zero elsewhere, and everywhere if none is."""
    if count < score_BTJ.shape[-1]:
        best_BTA = jax.lax.top_k(jnp.where(seen_BTJ, score_BTJ, -jnp.inf), count)[1]
        seen_BTJ &= jnp.any(best_BTA[..., None] == jnp.arange(score_BTJ.shape[-1]), axis=2)
    top_BT1 = jnp.max(jnp.where(seen_BTJ, score_BTJ, -jnp.inf), axis=-1, keepdims=True)
    score_BTJ = jnp.where(seen_BTJ, score_BTJ - jax.lax.stop_gradient(jnp.where(top_BT1 == -jnp.inf, 0.0, top_BT1)), 0.0)
    share_BTJ = jnp.where(seen_BTJ, jnp.exp(score_BTJ), 0.0)
    total_BT1 = jnp.sum(share_BTJ, axis=-1, keepdims=True)
    return share_BTJ / jnp.where(total_BT1 == 0, 1.0, total_BT1)


def sinusoid(position_BT: jax.Array, width: int) -> jax.Array:
    """(B, T, width) float32: sines and cosines of the position at frequencies from 1 down to 1 / 10000."""
    half = width // 2
    angle = position_BT[..., None] * 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    return jnp.pad(jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1), ((0, 0), (0, 0), (0, width - 2 * half)))
