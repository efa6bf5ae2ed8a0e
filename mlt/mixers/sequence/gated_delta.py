"""Gated delta rule (Gated DeltaNet, arXiv 2412.06464): a matrix state that forgets by a scalar and writes by error."""

from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mlt.config.problems import Problem
from mlt.mixers.base import BuildInfo, SequenceMixerConfig, save_point, shared_axis
from mlt.mixers.conv import CausalConv
from mlt.mixers.recurrent import RecurrentMixer, Row, empty_state
from mlt.mixers.sizes import not_divisor, not_positive, recurrence_flops
from mlt.nn.linear import Linear
from mlt.nn.norm import RMSNorm, l2_normalize
from mlt.nn.param import fan_in, inverse_softplus_of_step, log_of_uniform, param


class GatedDelta(SequenceMixerConfig):
    """S_t = e^{g_t} (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, read by q_t / sqrt(K) after the write.

    q and k are L2-normalized; g_t = -exp(A_log) softplus(x W_a + dt_bias); beta_t = sigmoid(x W_b).

    Attributes:
        num_heads: value heads (H).
        num_key_heads: query and key heads, a divisor of num_heads; None means num_heads.
        key_dim: width of a query or key (K).
        value_dim: width of a value (V); None means key_dim.
        conv_width: taps of the short convolutions on q, k and v.
        norm_eps: of the norm on what is read.
        negative_eigenvalues: beta in (0, 2) in place of (0, 1), which lets the state flip sign (arXiv 2411.12537).
    """

    context: ClassVar[str] = "carry"
    op: ClassVar[str] = "linear_recurrence"

    num_heads: int
    key_dim: int
    value_dim: int | None = None
    num_key_heads: int | None = None
    conv_width: int = 4
    norm_eps: float = 1e-6
    negative_eigenvalues: bool = False

    @property
    def key_heads(self) -> int:
        return self.num_key_heads or self.num_heads

    @property
    def values(self) -> int:
        return self.value_dim or self.key_dim

    def problems(self) -> Iterator[Problem]:
        sizes = list(not_positive(self, "num_heads", "key_dim", "value_dim", "num_key_heads", "conv_width"))
        yield from sizes or not_divisor(self, "num_key_heads", "num_heads")

    def build(self, info: BuildInfo) -> "GatedDeltaMixer":
        return GatedDeltaMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        keys, values = self.key_heads * self.key_dim, self.num_heads * self.values
        projections = 2 * d_model * (2 * keys + 3 * values + 2 * self.num_heads)
        recurrence = recurrence_flops(self.num_heads, self.key_dim, self.values, seq_len, rule="delta")
        return projections + 2 * self.conv_width * (2 * keys + values) + recurrence

    def state_size(self, d_model: int, seq_len: int) -> int:
        channels = 2 * self.key_heads * self.key_dim + self.num_heads * self.values
        return self.num_heads * self.key_dim * self.values + (self.conv_width - 1) * channels

    @classmethod
    def example(cls) -> tuple["GatedDelta", BuildInfo]:
        config = cls(num_heads=4, num_key_heads=2, key_dim=8, value_dim=16, negative_eigenvalues=True)
        return config, BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class GatedDeltaMixer(RecurrentMixer):
    def __init__(self, config: GatedDelta, info: BuildInfo):
        self.config = config
        d, h, hk, k, v = info.d_model, config.num_heads, config.key_heads, config.key_dim, config.values
        keys, values = ((shared_axis(hk), hk), ("head_dim", k)), (("heads", h), ("head_dim", v))
        self.query = Linear((("embed", d),), keys)
        self.key = Linear((("embed", d),), keys)
        self.value = Linear((("embed", d),), values)
        self.gate = Linear((("embed", d),), values)
        self.decay = Linear((("embed", d),), (("heads", h),))
        self.beta = Linear((("embed", d),), (("heads", h),))
        self.query_conv = CausalConv(keys, width=config.conv_width)
        self.key_conv = CausalConv(keys, width=config.conv_width)
        self.value_conv = CausalConv(values, width=config.conv_width)
        self.A_log = param((h,), ("heads",), log_of_uniform(1.0, 16.0), group="vector")
        self.dt_bias = param((h,), ("heads",), inverse_softplus_of_step(), group="vector")
        self.norm = RMSNorm(v, eps=config.norm_eps)
        self.output = Linear(values, (("embed", d),), init=fan_in(h * v, scale=info.residual_scale))

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> Any:
        config = self.config
        convs = {"query": self.query_conv, "key": self.key_conv, "value": self.value_conv}
        return empty_state(batch, dtype, convs, memory=(config.num_heads, config.key_dim, config.values))

    def mix(self, x_BTD: jax.Array, row: Row) -> jax.Array:
        q = l2_normalize(row.conv("query", self.query_conv, self.query(x_BTD)))
        k = l2_normalize(row.conv("key", self.key_conv, self.key(x_BTD)))
        v = row.conv("value", self.value_conv, self.value(x_BTD))
        pre_decay_BTH = self.decay(x_BTD).astype(jnp.float32) + self.dt_bias[...]
        log_decay_BTH = -jnp.exp(self.A_log[...]) * jax.nn.softplus(pre_decay_BTH)
        beta_BTH = jax.nn.sigmoid(self.beta(x_BTD).astype(jnp.float32))
        if self.config.negative_eigenvalues:
            beta_BTH = 2.0 * beta_BTH
        q, k, v, log_decay_BTH, beta_BTH = (save_point(x, "recurrence_in") for x in (q, k, v, log_decay_BTH, beta_BTH))
        o_BTHV = row.linear_recurrence(
            q, k, v, log_decay=log_decay_BTH, beta=beta_BTH, rule="delta", implementation=self.config.kernel
        )
        o_BTHV = save_point(o_BTHV, "recurrence_out")
        return self.output(self.norm(o_BTHV) * jax.nn.silu(self.gate(x_BTD)))
