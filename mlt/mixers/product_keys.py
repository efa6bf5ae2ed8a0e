"""Product keys (arXiv 1907.05242): the best of n^2 rows found by scoring two lists of n half keys."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mlt.config.problems import Problem
from mlt.mixers.base import BuildInfo, Mixer
from mlt.nn.linear import Linear
from mlt.nn.norm import RMSNorm
from mlt.nn.param import param, uniform
from mlt.parallel.local import local
from mlt.parallel.rules import Rules


def key_problems(config: Any, others: tuple[str, ...] = ()) -> Iterator[Problem]:
    """Problems of the fields num_keys, num_selected, num_heads and key_dim, and of `others` that must be positive."""
    for name in ("num_keys", "num_selected", "num_heads", "key_dim", *others):
        value = getattr(config, name)
        if value is not None and value < 1:
            yield Problem(name, value, "must be at least 1")
            return
    if config.num_selected > config.num_keys**2:
        rule = f"must be at most num_keys^2 = {config.num_keys**2}, the rows of the table"
        yield Problem("num_selected", config.num_selected, rule)
    if config.num_keys**2 > 2**31 - 1:
        rule = f"makes {config.num_keys**2} rows; row ids are 32-bit, so num_keys must be at most 46340"
        yield Problem("num_keys", config.num_keys, rule, "widen the rows, or add layers with a memory of their own")
    if config.key_dim % 2:
        yield Problem("key_dim", config.key_dim, "must be even: it is cut into two half keys")


class ProductKeyMixer(Mixer):
    """A mixer that reads the rows whose product keys its queries match best."""

    query: Linear
    query_norm: RMSNorm | None
    keys: nnx.Param

    def describe_keys(self, info: BuildInfo, config: Any) -> None:
        """Describe the queries and the half keys, by the config's num_keys, num_heads, key_dim, query_norm and bias."""
        heads = (("heads", config.num_heads), ("head_dim", config.key_dim))
        self.query = Linear((("embed", info.d_model),), heads, bias=config.bias)
        self.query_norm = RMSNorm(config.key_dim) if config.query_norm else None
        bound = config.key_dim**-0.5
        shape = (2, config.num_heads, config.num_keys, config.key_dim // 2)
        self.keys = param(shape, (None, "heads", None, "head_dim"), uniform(-bound, bound), group="embedding")

    def best_rows(self, x_BTD: jax.Array, rules: Rules, num_selected: int) -> tuple[jax.Array, jax.Array]:
        """Rows that each head reads, best first, and their weights: (B, T, H, K) int32 and float32, K = num_selected."""
        q_BTHK = self.query(x_BTD)
        if self.query_norm is not None:
            q_BTHK = self.query_norm(q_BTHK)
        q = q_BTHK.reshape(*q_BTHK.shape[:-1], 2, q_BTHK.shape[-1] // 2)
        keys = self.keys[...].astype(q.dtype)
        scores = jnp.einsum("bthsk,shnk->sbthn", q, keys, preferred_element_type=jnp.float32)
        axes = ("batch", "seq", "heads", None)
        best = local(functools.partial(best_pairs, count=num_selected), rules, (axes, axes), (axes, axes))
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
