"""Cross-decoder attention (YOCO, arXiv 2405.05254): queries of this layer, keys and values that an earlier one published."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import nnx
from mlt_kernels import attention

from mlt.config.problems import Problem
from mlt.mixers.base import Aux, BuildInfo, Context, Mixer, MixerConfig, Published, save_point
from mlt.mixers.published_keys import PublishedKeys
from mlt.mixers.rope_scaling import RopeScaling, rotation, rotation_problems
from mlt.mixers.sequence.attention import Attention, key_value_parts
from mlt.nn.linear import Linear
from mlt.nn.norm import RMSNorm
from mlt.nn.param import fan_in
from mlt.nn.rope import apply_rope
from mlt.parallel import ops


class CrossAttention(PublishedKeys):
    """Causal softmax attention to published keys and values: W_q, W_o and nothing else is the layer's own.

    Keys come rotated as their publisher rotated them, so the rotation of the queries must be the publisher's: another one is
    refused.

    Attributes:
        source, num_heads, head_dim, num_kv_heads: as for `PublishedKeys`.
        rope_base, rotary_dim, rope_scaling: rotary positions of the queries, as for `Attention`.
        qk_norm: RMSNorm the queries per head before the rotation.
        norm_eps: of that norm.
        output_gate: multiply the result by a sigmoid of the input, per channel.
        query_bias: a bias on W_q.
        output_bias: a bias on W_o.
    """

    rotary_dim: int | None = None
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = False
    norm_eps: float = 1e-6
    output_gate: bool = False
    query_bias: bool = False
    output_bias: bool = False

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from rotation_problems(self)

    def build(self, info: BuildInfo) -> "CrossAttentionMixer":
        return CrossAttentionMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        width = self.num_heads * self.head_dim
        return 2 * d_model * width * (3 if self.output_gate else 2) + 2 * width * (seq_len + 1)

    def reads(self, d_model: int) -> Mapping[str, Published]:
        return {self.source: key_value_parts(self)}

    @classmethod
    def example(cls) -> tuple["CrossAttention", BuildInfo]:
        config = cls(source="keys", num_heads=4, num_kv_heads=2, head_dim=8, qk_norm=True, output_gate=True)
        return config, BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)

    @classmethod
    def example_publishers(cls) -> tuple[MixerConfig, ...]:
        return (Attention(num_heads=2, head_dim=8, publish="keys"),)


class CrossAttentionMixer(Mixer):
    def __init__(self, config: CrossAttention, info: BuildInfo):
        self.config = config
        stream, heads = (("embed", info.d_model),), (("heads", config.num_heads), ("head_dim", config.head_dim))
        self.query = Linear(stream, heads, bias=config.query_bias)
        self.query_norm = RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.gate = Linear(stream, heads) if config.output_gate else None
        out_init = fan_in(config.num_heads * config.head_dim, scale=info.residual_scale)
        self.output = Linear(heads, stream, init=out_init, bias=config.output_bias)

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        seen, options = ctx.published[self.config.source], {"implementation": self.config.kernel}
        q_BTNH = self._query(x_BTD, ctx)
        o_BTNH = ops.attention(ctx.rules, q_BTNH, seen["key"], seen["value"], segment_ids=ctx.segment_ids, **options)
        return self._finish(o_BTNH, x_BTD), {}

    def step(self, x_BTD: jax.Array, state: Any, ctx: Context) -> tuple[jax.Array, Any]:
        """Attend to the publisher's cache, which has the new tokens already."""
        seen = ctx.published[self.config.source]
        o_BTNH = attention(
            self._query(x_BTD, ctx),
            seen["key"],
            seen["value"],
            segment_ids=(ctx.segment_ids, seen["segment"]),
            positions=(ctx.positions, seen["position"]),
            implementation=self.config.kernel,
        )
        return self._finish(o_BTNH, x_BTD), state

    def _query(self, x_BTD, ctx):
        q_BTNH = self.query(x_BTD)
        if self.query_norm is not None:
            q_BTNH = self.query_norm(q_BTNH)
        if self.config.rope_base is not None:
            q_BTNH = apply_rope(q_BTNH, ctx.positions, **rotation(self.config))
        return save_point(q_BTNH, "attention_qkv")

    def _finish(self, o_BTNH, x_BTD):
        o_BTNH = save_point(o_BTNH, "attention_out")
        if self.gate is not None:
            o_BTNH = o_BTNH * nnx.sigmoid(self.gate(x_BTD))
        return self.output(o_BTNH)
