"""Kimi Delta Attention (KDA, arXiv 2510.26692): the delta rule with a decay of its own for every key channel."""

from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mlt.config.problems import Problem
from mlt.mixers.base import BuildInfo, SequenceMixerConfig, save_point
from mlt.mixers.conv import CausalConv
from mlt.mixers.recurrent import RecurrentMixer, Row, empty_state
from mlt.mixers.sizes import not_positive, recurrence_flops
from mlt.nn.linear import Linear
from mlt.nn.norm import RMSNorm, l2_normalize
from mlt.nn.param import fan_in, inverse_softplus_of_step, log_of_uniform, param, zeros


class KimiDelta(SequenceMixerConfig):
    """S_t = (I - beta_t k_t k_t^T) diag(e^{g_t}) S_{t-1} + beta_t k_t v_t^T, read by q_t / sqrt(K) after the write.

    q, k and v pass a short convolution and SiLU, q and k are L2-normalized, beta_t = sigmoid(x W_b), and
    out = W_o (norm(o) * sigmoid(W_2 W_1 x + b)), the norm's scale shared by the heads. With f = W_2 W_1 x, inner width
    value_dim and no bias, the log decay is

        without bound    g = -exp(A_log) softplus(f + dt_bias)        A_log a head, dt_bias a channel
        with bound       g = decay_bound * sigmoid(exp(A_log) (f + dt_bias)), A_log from 0 (the released safe gate)

    Attributes:
        num_heads: heads (H).
        key_dim: width of a query or key (K).
        value_dim: width of a value (V); None means key_dim.
        conv_width: taps of the short convolutions on q, k and v.
        decay_bound: smallest log decay, negative, -5 in released code; None leaves it unbounded.
        gate_bias: a bias on the output gate.
        norm_eps: of the norm on what is read.
    """

    context: ClassVar[str] = "carry"
    op: ClassVar[str] = "linear_recurrence"

    num_heads: int
    key_dim: int = 128
    value_dim: int | None = None
    conv_width: int = 4
    decay_bound: float | None = None
    gate_bias: bool = True
    norm_eps: float = 1e-6

    @property
    def values(self) -> int:
        return self.value_dim or self.key_dim

    def problems(self) -> Iterator[Problem]:
        yield from not_positive(self, "num_heads", "key_dim", "value_dim", "conv_width")
        if self.decay_bound is not None and self.decay_bound >= 0:
            yield Problem("decay_bound", self.decay_bound, "must be negative: it is a logarithm", "use -5.0 or None")

    def build(self, info: BuildInfo) -> "KimiDeltaMixer":
        return KimiDeltaMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        keys, values, rank = self.num_heads * self.key_dim, self.num_heads * self.values, self.values
        low_rank = 2 * rank * (2 * d_model + keys + values)
        projections = 2 * d_model * (2 * keys + 2 * values + self.num_heads) + 2 * self.conv_width * (2 * keys + values)
        return projections + low_rank + recurrence_flops(self.num_heads, self.key_dim, self.values, seq_len, rule="delta")

    def state_size(self, d_model: int, seq_len: int) -> int:
        channels = self.num_heads * (2 * self.key_dim + self.values)
        return self.num_heads * self.key_dim * self.values + (self.conv_width - 1) * channels

    @classmethod
    def example(cls) -> tuple["KimiDelta", BuildInfo]:
        return cls(num_heads=2, key_dim=8, value_dim=16), BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class KimiDeltaMixer(RecurrentMixer):
    def __init__(self, config: KimiDelta, info: BuildInfo):
        self.config = config
        d, h, k, v = info.d_model, config.num_heads, config.key_dim, config.values
        stream, rank = (("embed", d),), ((None, v),)
        keys, values = (("heads", h), ("head_dim", k)), (("heads", h), ("head_dim", v))
        self.query = Linear(stream, keys)
        self.key = Linear(stream, keys)
        self.value = Linear(stream, values)
        self.beta = Linear(stream, (("heads", h),))
        self.decay_in = Linear(stream, rank)
        self.decay_out = Linear(rank, keys)
        self.gate_in = Linear(stream, rank)
        self.gate_out = Linear(rank, values, bias=config.gate_bias)
        self.query_conv = CausalConv(keys, width=config.conv_width)
        self.key_conv = CausalConv(keys, width=config.conv_width)
        self.value_conv = CausalConv(values, width=config.conv_width)
        rates = log_of_uniform(1.0, 16.0) if config.decay_bound is None else zeros
        self.A_log = param((h,), ("heads",), rates, group="vector")
        self.dt_bias = param((h, k), ("heads", "head_dim"), inverse_softplus_of_step(), group="vector")
        self.norm = RMSNorm(v, eps=config.norm_eps)
        self.output = Linear(values, stream, init=fan_in(h * v, scale=info.residual_scale))

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> Any:
        config = self.config
        convs = {"query": self.query_conv, "key": self.key_conv, "value": self.value_conv}
        return empty_state(batch, dtype, convs, memory=(config.num_heads, config.key_dim, config.values))

    def mix(self, x_BTD: jax.Array, row: Row) -> jax.Array:
        q = l2_normalize(row.conv("query", self.query_conv, self.query(x_BTD)))
        k = l2_normalize(row.conv("key", self.key_conv, self.key(x_BTD)))
        v = row.conv("value", self.value_conv, self.value(x_BTD))
        beta_BTH = jax.nn.sigmoid(self.beta(x_BTD).astype(jnp.float32))
        inputs = (q, k, v, self._log_decay(x_BTD), beta_BTH)
        q, k, v, log_decay_BTHK, beta_BTH = (save_point(x, "recurrence_in") for x in inputs)
        o_BTHV = row.linear_recurrence(
            q, k, v, log_decay=log_decay_BTHK, beta=beta_BTH, rule="delta", implementation=self.config.kernel
        )
        o_BTHV = save_point(o_BTHV, "recurrence_out")
        return self.output(self.norm(o_BTHV) * jax.nn.sigmoid(self.gate_out(self.gate_in(x_BTD))))

    def _log_decay(self, x_BTD: jax.Array) -> jax.Array:
        pre_BTHK = self.decay_out(self.decay_in(x_BTD).astype(jnp.float32)) + self.dt_bias[...]
        rate_HK = jnp.exp(self.A_log[...])[:, None]
        if self.config.decay_bound is None:
            return -rate_HK * jax.nn.softplus(pre_BTHK)
        return self.config.decay_bound * jax.nn.sigmoid(rate_HK * pre_BTHK)
