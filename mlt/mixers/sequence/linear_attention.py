"""Linear attention (arXiv 2006.16236): softmax's exponential replaced by features, so that the past is one matrix."""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from mlt.config.problems import Problem
from mlt.mixers import feature_map
from mlt.mixers.base import BuildInfo, SequenceMixerConfig, save_point
from mlt.mixers.recurrent import RecurrentMixer, Row, empty_normalized, empty_state
from mlt.mixers.sizes import not_positive, recurrence_flops
from mlt.nn.linear import Linear
from mlt.nn.norm import RMSNorm
from mlt.nn.param import fan_in


class LinearAttention(SequenceMixerConfig):
    """o_t = sum over s <= t of (f(q_t) . f(k_s)) v_s, divided by sum over s <= t of f(q_t) . f(k_s) or normalized.

    Features f:

        elu         elu(x) + 1 (arXiv 2006.16236)
        hedgehog    [exp(x W), exp(-x W)], W learned a head, from the identity (arXiv 2402.04347): 2 key_dim features
        relu, identity    not positive, so only with normalizer "norm"

    Attributes:
        num_heads: heads (H).
        key_dim: width of a query or key (K).
        value_dim: width of a value (V); None means key_dim.
        features: the feature map.
        normalizer: "sum" divides by the sum of the weights; "norm" does not, and norms the output of each head
            (RMSNorm, scale shared by the heads; arXiv 2210.10340).
    """

    context: ClassVar[str] = "carry"
    op: ClassVar[str] = "linear_recurrence"

    num_heads: int
    key_dim: int
    value_dim: int | None = None
    features: feature_map.Name = "elu"
    normalizer: Literal["sum", "norm"] = "sum"

    @property
    def values(self) -> int:
        return self.value_dim or self.key_dim

    @property
    def feature_dim(self) -> int:
        return 2 * self.key_dim if self.features == "hedgehog" else self.key_dim

    def problems(self) -> Iterator[Problem]:
        yield from not_positive(self, "num_heads", "key_dim", "value_dim")
        if self.normalizer == "sum" and self.features not in feature_map.POSITIVE:
            rule = "must be positive to be divided by, under normalizer = 'sum'"
            yield Problem("features", self.features, rule, "use 'elu' or 'hedgehog', or normalizer='norm'")
        if self.normalizer == "norm" and self.features == "hedgehog":
            rule = "has exponentials that only normalizer = 'sum' takes out again"
            yield Problem("features", self.features, rule, "use normalizer='sum', or other features")

    def build(self, info: BuildInfo) -> "LinearAttentionMixer":
        return LinearAttentionMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        keys, values = self.num_heads * self.key_dim, self.num_heads * self.values
        maps = 4 * keys * self.key_dim if self.features == "hedgehog" else 0
        recurrence = recurrence_flops(self.num_heads, self.feature_dim, self.values, seq_len)
        return 2 * d_model * (2 * keys + 2 * values) + maps + recurrence

    def state_size(self, d_model: int, seq_len: int) -> int:
        sums = self.feature_dim + 1 if self.normalizer == "sum" else 0
        return self.num_heads * (self.feature_dim * self.values + sums)

    @classmethod
    def example(cls) -> tuple["LinearAttention", BuildInfo]:
        config = cls(num_heads=2, key_dim=8, value_dim=16, features="hedgehog")
        return config, BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class LinearAttentionMixer(RecurrentMixer):
    def __init__(self, config: LinearAttention, info: BuildInfo):
        self.config = config
        d, h, k, v = info.d_model, config.num_heads, config.key_dim, config.values
        stream, keys, values = (("embed", d),), (("heads", h), ("head_dim", k)), (("heads", h), ("head_dim", v))
        self.query = Linear(stream, keys)
        self.key = Linear(stream, keys)
        self.value = Linear(stream, values)
        learned = config.features == "hedgehog"
        self.query_map = feature_map.Hedgehog(h, k) if learned else None
        self.key_map = feature_map.Hedgehog(h, k) if learned else None
        self.norm = RMSNorm(v) if config.normalizer == "norm" else None
        self.output = Linear(values, stream, init=fan_in(h * v, scale=info.residual_scale))

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> Any:
        config = self.config
        shape = (config.num_heads, config.feature_dim, config.values)
        return empty_state(batch, dtype, memory=empty_normalized(batch, *shape) if config.normalizer == "sum" else shape)

    def mix(self, x_BTD: jax.Array, row: Row) -> jax.Array:
        config = self.config
        q, k, v = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        if self.query_map is None or self.key_map is None:
            q, k, log_input_BTH = feature_map.elementwise(config.features, q), feature_map.elementwise(config.features, k), None
        else:
            (q, _), (k, log_input_BTH) = self.query_map(q), self.key_map(k)
        q, k, v = (save_point(x, "recurrence_in") for x in (q, k, v))
        normalizer = "sum" if config.normalizer == "sum" else "none"
        o_BTHV = row.linear_recurrence(
            q, k, v, log_input=log_input_BTH, normalizer=normalizer, scale=1.0, implementation=config.kernel
        )
        o_BTHV = save_point(o_BTHV, "recurrence_out")
        return self.output(o_BTHV if self.norm is None else self.norm(o_BTHV))
