"""Product-key memory: a very large key-value table whose best rows are found by scoring two short lists of half keys."""

import functools
from collections.abc import Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp

from mlt.config.problems import Problem
from mlt.mixers.base import Aux, BuildInfo, ChannelMixerConfig, Context, Mixer, save_point
from mlt.nn.linear import Linear
from mlt.nn.norm import RMSNorm
from mlt.nn.param import fan_in, normal, param, uniform
from mlt.parallel import ops
from mlt.parallel.local import local
from mlt.parallel.rules import Rules


class ProductKeyMemory(ChannelMixerConfig):
    """p = sum over heads and their best rows of softmax(score) * value; y = W_out (p * silu(W_gate x)).

    Product-key memory (arXiv 1907.05242) with the input gate of Memory+ (arXiv 2412.09764), and with RMSNorm on the
    queries in place of batch statistics. Row i * num_keys + j has the key (first[i], second[j]), so its score is a sum
    of two, and the best rows of num_keys^2 are found exactly from the best of each half.

    Attributes:
        num_keys: half keys of each kind; the table has num_keys^2 rows (M).
        num_selected: rows that each head reads per token (K).
        num_heads: heads, each with queries and half keys of its own; all read one table (H).
        key_dim: width of a query, both halves together.
        value_dim: width of a row; None means d_model.
        gated: False is the plain form. Then y = p, with W_out only where value_dim is not d_model.
        kernel: backend of the row lookup; None takes the best available, a name is strict.
    """

    op: ClassVar[str] = "row_lookup"

    num_keys: int
    num_selected: int = 32
    num_heads: int = 4
    key_dim: int = 256
    value_dim: int | None = None
    gated: bool = True
    kernel: str | None = None

    @property
    def num_rows(self) -> int:
        return self.num_keys**2

    def problems(self) -> Iterator[Problem]:
        for name in ("num_keys", "num_selected", "num_heads", "key_dim", "value_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield Problem(name, value, "must be at least 1")
                return
        if self.num_selected > self.num_rows:
            rule = f"must be at most num_keys^2 = {self.num_rows}, the rows of the table"
            yield Problem("num_selected", self.num_selected, rule)
        if self.num_rows > 2**31 - 1:
            rule = f"makes {self.num_rows} rows; row ids are 32-bit, so num_keys must be at most 46340"
            yield Problem("num_keys", self.num_keys, rule, "widen value_dim, or add layers with a memory of their own")
        if self.key_dim % 2:
            yield Problem("key_dim", self.key_dim, "must be even: it is cut into two half keys")

    def build(self, info: BuildInfo) -> "ProductKeyMemoryMixer":
        return ProductKeyMemoryMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        width = self.value_dim or d_model
        search = 2 * self.num_heads * self.key_dim * (d_model + self.num_keys)
        matrices = (2 if self.gated else int(width != d_model)) * 2 * d_model * width
        return search + 2 * self.num_heads * self.num_selected * width + matrices

    def state_size(self, d_model: int, seq_len: int) -> int:
        return 0

    def inactive_params(self, d_model: int) -> int:
        read = min(self.num_heads * self.num_selected, self.num_rows)
        return (self.value_dim or d_model) * (self.num_rows - read)

    @classmethod
    def example(cls) -> tuple["ProductKeyMemory", BuildInfo]:
        config = cls(num_keys=16, num_selected=6, num_heads=2, key_dim=16, value_dim=24)
        return config, BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class ProductKeyMemoryMixer(Mixer):
    def __init__(self, config: ProductKeyMemory, info: BuildInfo):
        self.config = config
        d, h, k = info.d_model, config.num_heads, config.key_dim
        v = config.value_dim or d
        self.query = Linear((("embed", d),), (("heads", h), ("head_dim", k)))
        self.query_norm = RMSNorm(k)
        keys = (2, h, config.num_keys, k // 2)
        self.keys = param(keys, (None, "heads", None, "head_dim"), uniform(-(k**-0.5), k**-0.5), group="embedding")
        self.values = param((config.num_rows, v), ("memory", None), normal(v**-0.5), group="table")
        self.gate = Linear((("embed", d),), (("ffn", v),)) if config.gated else None
        out = Linear((("ffn", v),), (("embed", d),), init=fan_in(v, scale=info.residual_scale))
        self.output = out if config.gated or v != d else None

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        rows_BTHK, weights_BTHK = self.select(x_BTD, ctx.rules)
        rows_BTHK = jnp.where(ctx.is_token[..., None, None], rows_BTHK, -1)
        flat = (*x_BTD.shape[:2], rows_BTHK.shape[2] * rows_BTHK.shape[3])
        p_BTV = ops.row_lookup(
            ctx.rules,
            self.values[...],
            rows_BTHK.reshape(flat),
            weights_BTHK.reshape(flat),
            implementation=self.config.kernel,
        )
        y = save_point(p_BTV.astype(x_BTD.dtype), "memory_out")
        if self.gate is not None:
            y = y * jax.nn.silu(self.gate(x_BTD))
        return y if self.output is None else self.output(y), {}

    def select(self, x_BTD: jax.Array, rules: Rules) -> tuple[jax.Array, jax.Array]:
        """Rows that each head reads, best first, and their weights: (B, T, H, K) int32 and float32."""
        q_BTHK = self.query_norm(self.query(x_BTD))
        q = q_BTHK.reshape(*q_BTHK.shape[:-1], 2, q_BTHK.shape[-1] // 2)
        keys = self.keys[...].astype(q.dtype)
        scores = jnp.einsum("bthsk,shnk->sbthn", q, keys, preferred_element_type=jnp.float32)
        axes = ("batch", "seq", "heads", None)
        best = local(functools.partial(best_pairs, count=self.config.num_selected), rules, (axes, axes), (axes, axes))
        scores_BTHK, rows_BTHK = best(scores[0], scores[1])
        return rows_BTHK, jax.nn.softmax(scores_BTHK, axis=-1)


def best_pairs(first: jax.Array, second: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` largest sums first[..., i] + second[..., j], largest first, and their ids i * n + j.

    The a-th best of one half with the b-th best of the other (from 0) has (a + 1) (b + 1) - 1 pairs at least as good,
    so only pairs with (a + 1) (b + 1) <= count can be among the best `count`.

    Args:
        first, second: (..., n) scores; 1 <= count <= n^2.
    """
    size = first.shape[-1]
    kept = min(count, size)
    score_a, index_a = jax.lax.top_k(first, kept)
    score_b, index_b = jax.lax.top_k(second, kept)
    scores, ids = [], []
    for a in range(kept):
        reach = min(kept, count // (a + 1))
        scores.append(score_a[..., a : a + 1] + score_b[..., :reach])
        ids.append(index_a[..., a : a + 1] * size + index_b[..., :reach])
    best, at = jax.lax.top_k(jnp.concatenate(scores, axis=-1), count)
    return best, jnp.take_along_axis(jnp.concatenate(ids, axis=-1), at, axis=-1)
