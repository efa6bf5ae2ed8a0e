"""Differential cross attention (SambaY, arXiv 2507.06607): queries of this layer, keys and values that another published."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax

from mlt.config.problems import Problem
from mlt.mixers.base import Aux, BuildInfo, Context, MixerConfig, Published, save_point
from mlt.mixers.published_keys import PublishedKeys
from mlt.mixers.sequence.differential_attention import (
    DifferentialAttention,
    DifferentialMixer,
    attend_to_cache,
    differential_parts,
    lambda_problems,
)
from mlt.mixers.sizes import rope_problems
from mlt.nn.linear import Linear
from mlt.nn.rope import apply_rope
from mlt.parallel import ops


class DifferentialCrossAttention(PublishedKeys):
    """`DifferentialAttention` to the keys and values that an earlier layer published: queries, lambda, the norm and the output
    projection are the layer's own. Heads are pairs of heads here, and values are twice as wide as keys.

    Attributes:
        source, num_heads, head_dim, num_kv_heads, rope_base: as for `PublishedKeys`.
        lambda_init, depth, norm_scale, norm_eps: as for `DifferentialAttention`.
        query_bias: a bias on the queries' projection.
        output_bias: a bias on the output projection.
    """

    lambda_init: float = 0.8
    depth: tuple[int, int] | None = None
    norm_scale: bool = True
    norm_eps: float = 1e-5
    query_bias: bool = False
    output_bias: bool = False

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from rope_problems(self)
        yield from lambda_problems(self)

    def build(self, info: BuildInfo) -> "DifferentialCrossAttentionMixer":
        return DifferentialCrossAttentionMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        queries = 2 * self.num_heads * self.head_dim
        return 4 * d_model * queries + 3 * queries * (seq_len + 1)

    def reads(self, d_model: int) -> Mapping[str, Published]:
        return {self.source: differential_parts(self)}

    @classmethod
    def example(cls) -> tuple["DifferentialCrossAttention", BuildInfo]:
        config = cls(source="keys", num_heads=2, num_kv_heads=1, head_dim=8, depth=(5, 2), query_bias=True)
        return config, BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)

    @classmethod
    def example_publishers(cls) -> tuple[MixerConfig, ...]:
        return (DifferentialAttention(num_heads=1, head_dim=8, publish="keys"),)


class DifferentialCrossAttentionMixer(DifferentialMixer):
    def __init__(self, config: DifferentialCrossAttention, info: BuildInfo):
        self.config = config
        heads = ((None, 2), ("heads", config.num_heads), ("head_dim", config.head_dim))
        self.query = Linear((("embed", info.d_model),), heads, bias=config.query_bias)
        self._make_difference(info, bias=config.output_bias)

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        seen, options = ctx.published[self.config.source], {"implementation": self.config.kernel}
        pairs = zip(self._queries(x_BTD, ctx), (seen["first"], seen["second"]), strict=True)
        options |= {"segment_ids": ctx.segment_ids}
        maps = [ops.attention(ctx.rules, query, keys, seen["value"], **options) for query, keys in pairs]
        return self._finish(*maps), {}

    def step(self, x_BTD: jax.Array, state: Any, ctx: Context) -> tuple[jax.Array, Any]:
        """Attend to the publisher's cache, which has the new tokens already."""
        maps = attend_to_cache(
            self._queries(x_BTD, ctx), ctx.published[self.config.source], ctx, implementation=self.config.kernel
        )
        return self._finish(*maps), state

    def _queries(self, x_BTD: jax.Array, ctx: Context) -> list[jax.Array]:
        q_BT2NH = self.query(x_BTD)
        q = [q_BT2NH[:, :, i] for i in (0, 1)]
        if self.config.rope_base is not None:
            q = [apply_rope(x, ctx.positions, base=self.config.rope_base) for x in q]
        return [save_point(x, "attention_qkv") for x in q]
