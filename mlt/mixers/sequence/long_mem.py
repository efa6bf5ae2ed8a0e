"""LongMem (arXiv 2306.07174): attention inside a segment, joined with chunks of a frozen layer's keys and values before it."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from mlt_kernels import attention

from mlt.config.problems import Problem
from mlt.mixers import cache
from mlt.mixers.base import Aux, BuildInfo, Context, Mixer, MixerConfig, Published, SequenceMixerConfig, save_point, shared_axis
from mlt.mixers.closed_blocks import Blocks, closed_blocks, gather, members
from mlt.mixers.rope_scaling import RopeScaling, rotation, rotation_problems
from mlt.mixers.sequence.attention import Attention, key_value_parts
from mlt.mixers.sizes import not_divisor, not_positive
from mlt.nn.linear import Linear
from mlt.nn.param import fan_in, param, zeros
from mlt.nn.rope import apply_rope
from mlt.parallel import ops
from mlt.parallel.local import HEADS, KV_HEADS, Q_HEADS, TOKENS, local

_QUERIES = 128
"""Queries whose chosen keys and values exist at a time."""


class LongMem(SequenceMixerConfig):
    """y = W_o ((1 - g) softmax attention to the own segment + g softmax attention to the chosen chunks), g = sigmoid(b) by head:

        the chunks j with the largest q . (mean of the chunk's keys), `selected` of them, among those of earlier segments

    Documents are cut into segments of `segment` tokens from their starts. The bank of a token is what an earlier layer, of a
    frozen model, published of the last `bank` tokens in front of the token's segment: of its own document, and nothing of its
    own segment. A head chooses for itself, and all tokens of its chunks share one softmax. Where the bank is empty, g is 0.
    Keys are rotated as their publisher rotated them, so these queries' rotation must be its: another one is refused. No gradient
    flows through the choice.

    Attributes:
        source: name under which the bank's keys and values were published.
        num_heads: query heads (N).
        head_dim: width of a head (H).
        num_kv_heads: key and value heads (K), the publisher's too; None means num_heads.
        segment: tokens of a segment.
        chunk: tokens of a chunk, a divisor of segment.
        selected: chunks that a head of a token reads.
        bank: tokens in the bank, a multiple of chunk.
        rope_base, rotary_dim, rope_scaling: rotary positions, as for `Attention`.
        kernel: backend of the attention inside a segment.
    """

    context: ClassVar[str] = "none"
    op: ClassVar[str] = "attention"

    source: str
    num_heads: int
    head_dim: int
    num_kv_heads: int | None = None
    segment: int = 1024
    chunk: int = 4
    selected: int = 16
    bank: int = 65_536
    rope_base: float | None = 10_000.0
    rotary_dim: int | None = None
    rope_scaling: RopeScaling | None = None

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    def problems(self) -> Iterator[Problem]:
        sizes = ("num_heads", "head_dim", "num_kv_heads", "segment", "chunk", "selected", "bank")
        wrong = list(not_positive(self, *sizes))
        yield from wrong
        if wrong:
            return
        for part, whole in (("num_kv_heads", "num_heads"), ("chunk", "segment"), ("chunk", "bank")):
            yield from not_divisor(self, part, whole)
        yield from rotation_problems(self)

    def build(self, info: BuildInfo) -> "LongMemMixer":
        return LongMemMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        width = self.num_heads * self.head_dim
        projections = 2 * d_model * (2 * width + 2 * self.kv_heads * self.head_dim)
        own = (min(self.segment, seq_len) + 1) / 2
        banked = min(max(seq_len - self.segment, 0) / 2, self.bank)
        return (
            projections + 4 * width * own + 2 * width * banked / self.chunk + 4 * width * min(self.selected * self.chunk, banked)
        )

    def state_size(self, d_model: int, seq_len: int) -> int:
        return 2 * cache.slots(seq_len, self.segment) * self.kv_heads * self.head_dim

    def reads(self, d_model: int) -> Mapping[str, Published]:
        return {self.source: key_value_parts(self)}

    @classmethod
    def example(cls) -> tuple["LongMem", BuildInfo]:
        config = cls(source="keys", num_heads=4, num_kv_heads=2, head_dim=8, segment=6, chunk=2, selected=2, bank=16)
        return config, BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)

    @classmethod
    def example_publishers(cls) -> tuple[MixerConfig, ...]:
        return (Attention(num_heads=2, head_dim=8, publish="keys"),)


class LongMemMixer(Mixer):
    def __init__(self, config: LongMem, info: BuildInfo):
        self.config = config
        d, n, k, h = info.d_model, config.num_heads, config.kv_heads, config.head_dim
        self.query = Linear((("embed", d),), (("heads", n), ("head_dim", h)))
        self.key = Linear((("embed", d),), ((shared_axis(k), k), ("head_dim", h)))
        self.value = Linear((("embed", d),), ((shared_axis(k), k), ("head_dim", h)))
        self.output = Linear((("heads", n), ("head_dim", h)), (("embed", d),), init=fan_in(n * h, scale=info.residual_scale))
        self.gate = param((n,), ("heads",), zeros, group="vector")

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        q, k, v = self._project(x_BTD, ctx)
        options = {"segment_ids": self._segments(ctx.segment_ids, ctx.positions), "implementation": self.config.kernel}
        near_BTNH = ops.attention(ctx.rules, q, k, v, **options)
        seen = ctx.published[self.config.source]
        tokens = (ctx.segment_ids, ctx.positions)
        inputs = (Q_HEADS, Q_HEADS, HEADS, TOKENS, TOKENS, KV_HEADS, KV_HEADS, TOKENS, TOKENS)
        join = local(self._join, ctx.rules, inputs, Q_HEADS)
        return self._finish(join(near_BTNH, q, self.gate[...], *tokens, seen["key"], seen["value"], *tokens)), {}

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> Any:
        heads = (self.config.kv_heads, self.config.head_dim)
        return cache.empty_cache(batch, cache.slots(max_length, self.config.segment), dtype, key=heads, value=heads)

    def step(self, x_BTD: jax.Array, state: Any, ctx: Context) -> tuple[jax.Array, Any]:
        """Attend to the own segment's last tokens, which it keeps, and to the publisher's cache."""
        q, k, v = self._project(x_BTD, ctx)
        own, state = cache.extend(state, ctx, window=self.config.segment, key=k, value=v)
        number = lambda positions: positions // self.config.segment  # noqa: E731
        banked = ctx.published[self.config.source]
        span = banked["position"].shape[1] // self.config.segment + 2
        joined = lambda segments, positions: jnp.where(segments == 0, 0, segments * span + number(positions))  # noqa: E731
        near_BTNH = attention(
            q,
            own["key"],
            own["value"],
            segment_ids=(joined(ctx.segment_ids, ctx.positions), joined(own["segment"], own["position"])),
            positions=(ctx.positions, own["position"]),
            implementation=self.config.kernel,
        )
        tokens, theirs = (ctx.segment_ids, ctx.positions), (banked["segment"], banked["position"])
        return self._finish(self._join(near_BTNH, q, self.gate[...], *tokens, banked["key"], banked["value"], *theirs)), state

    def _project(self, x_BTD, ctx):
        q, k, v = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        if self.config.rope_base is not None:
            q, k = (apply_rope(x, ctx.positions, **rotation(self.config)) for x in (q, k))
        return tuple(save_point(x, "attention_qkv") for x in (q, k, v))

    def _finish(self, o_BTNH):
        return self.output(save_point(o_BTNH, "attention_out"))

    def _segments(self, segments_BT, positions_BT):
        """One id for each segment of each document of a row."""
        first_BT = (positions_BT % self.config.segment == 0) & (segments_BT != 0)
        return jnp.where(segments_BT == 0, 0, jnp.cumsum(first_BT, axis=1, dtype=jnp.int32))

    def _join(self, near_BTNH, q_BTNH, gate_N, segments_BT, positions_BT, k_BSKH, v_BSKH, their_segments_BS, their_positions_BS):
        """Both attentions, weighed by the gate."""
        size = self.config.chunk
        blocks = closed_blocks(their_segments_BS, their_positions_BS, size)
        index_BJC, there_BJC = members(blocks, k_BSKH.shape[1], size)
        chunks_BJCKH = jnp.where(there_BJC[..., None, None], gather(k_BSKH, index_BJC), jnp.zeros((), k_BSKH.dtype))
        means_BJKH = jnp.mean(chunks_BJCKH.astype(jnp.float32), axis=2)
        B, T, N, _ = q_BTNH.shape
        size = min(_QUERIES, T)
        count = -(-T // size)

        def cut(x):
            x = jnp.pad(x, [(0, 0), (0, count * size - T)] + [(0, 0)] * (x.ndim - 2))
            return x.reshape(B, count, size, *x.shape[2:]).swapaxes(0, 1)

        def body(_, part):
            return None, self._far(*part, means_BJKH, blocks, index_BJC, k_BSKH, v_BSKH)

        parts = tuple(cut(x) for x in (q_BTNH, segments_BT, positions_BT))
        _, (far, found) = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), None, parts)
        far_BTNH = far.swapaxes(0, 1).reshape(B, count * size, N, -1)[:, :T]
        found_BT = found.swapaxes(0, 1).reshape(B, count * size)[:, :T]
        share_BTN1 = jnp.where(found_BT[..., None], nnx.sigmoid(gate_N.astype(jnp.float32)), 0.0)[..., None]
        return ((1 - share_BTN1) * near_BTNH + share_BTN1 * far_BTNH).astype(near_BTNH.dtype)

    def _far(self, q_BTNH, segments_BT, positions_BT, means_BJKH, blocks: Blocks, index_BJC, k_BSKH, v_BSKH):
        """What the chosen chunks answer (B, T, N, H) float32, and whether there are any (B, T)."""
        config = self.config
        seen_BTJ = self._in_bank(blocks, segments_BT, positions_BT)
        B, T, N, H = q_BTNH.shape
        K = k_BSKH.shape[2]
        q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
        with jax.default_matmul_precision("highest"):
            score = jnp.einsum("btkgh,bjkh->bkgtj", q_BTKGH.astype(jnp.float32), means_BJKH)
        score = jax.lax.stop_gradient(jnp.where(seen_BTJ[:, None, None], score, -jnp.inf))
        best, chosen_BKGTA = jax.lax.top_k(score, min(config.selected, score.shape[-1]))
        there = jnp.repeat(best > -jnp.inf, index_BJC.shape[-1], axis=-1)

        def pick(index_JC, k_SH, v_SH, chosen_GTA):
            index = index_JC[chosen_GTA].reshape(*chosen_GTA.shape[:-1], -1)
            return k_SH[index], v_SH[index]

        over_heads = jax.vmap(pick, in_axes=(None, 1, 1, 0))
        k_BKGTMH, v_BKGTMH = jax.vmap(over_heads)(index_BJC, k_BSKH, v_BSKH, chosen_BKGTA)
        x = jnp.einsum("btkgh,bkgtmh->bkgtm", q_BTKGH, k_BKGTMH, preferred_element_type=jnp.float32) * H**-0.5
        x = jnp.where(there, x, -jnp.inf)
        top = jax.lax.stop_gradient(jnp.max(x, axis=-1, keepdims=True))
        weight = jnp.where(there, jnp.exp(jnp.where(there, x - jnp.where(top == -jnp.inf, 0.0, top), 0.0)), 0.0)
        total = jnp.sum(weight, axis=-1, keepdims=True)
        weight = weight / jnp.where(total == 0, 1.0, total)
        o = jnp.einsum("bkgtm,bkgtmh->btkgh", weight.astype(v_BKGTMH.dtype), v_BKGTMH, preferred_element_type=jnp.float32)
        return o.reshape(B, T, N, H), jnp.any(seen_BTJ, axis=-1)

    def _in_bank(self, blocks: Blocks, segments_BT, positions_BT):
        """(B, T, J): the chunk is of the token's document, of an earlier segment, and not too old."""
        config = self.config
        first_BT = positions_BT // config.segment * (config.segment // config.chunk)
        same_BTJ = (blocks.segment[:, None] == segments_BT[..., None]) & (segments_BT != 0)[..., None]
        back_BTJ = first_BT[..., None] - blocks.number[:, None]
        return same_BTJ & (back_BTJ > 0) & (back_BTJ <= config.bank // config.chunk)
