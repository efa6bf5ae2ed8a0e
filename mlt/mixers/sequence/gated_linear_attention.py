"""Gated linear attention (GLA, arXiv 2312.06635): a matrix state that forgets each key channel at a rate of its own."""

from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mlt.config.problems import Problem
from mlt.mixers.base import BuildInfo, SequenceMixerConfig, save_point
from mlt.mixers.recurrent import RecurrentMixer, Row, empty_state
from mlt.mixers.sizes import not_positive, recurrence_flops
from mlt.nn.linear import Linear
from mlt.nn.norm import RMSNorm
from mlt.nn.param import fan_in


class GatedLinearAttention(SequenceMixerConfig):
    """S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t / sqrt(K), out = W_o (norm(o) * silu(x W_g)).

    g = log_sigmoid(W_2 (W_1 x) + b) / temperature, with W_1 into `gate_rank` channels. The paper's sizes are 4 heads,
    key_dim = d_model / 8 and value_dim = d_model / 4.

    The norm's scale is shared by the heads. The bias of the gate starts at zero, so that decays start near
    0.5 ** (1 / temperature).

    Attributes:
        num_heads: heads (H).
        key_dim: width of a query or key (K).
        value_dim: width of a value (V); None means twice key_dim.
        gate_rank: inner width of the decay's two-layer projection.
        temperature: divides the log decay; a larger one forgets more slowly.
    """

    context: ClassVar[str] = "carry"
    op: ClassVar[str] = "linear_recurrence"

    num_heads: int
    key_dim: int
    value_dim: int | None = None
    gate_rank: int = 16
    temperature: float = 16.0

    @property
    def values(self) -> int:
        return self.value_dim or 2 * self.key_dim

    def problems(self) -> Iterator[Problem]:
        yield from not_positive(self, "num_heads", "key_dim", "value_dim", "gate_rank")
        if self.temperature <= 0:
            yield Problem("temperature", self.temperature, "must be positive")

    def build(self, info: BuildInfo) -> "GatedLinearAttentionMixer":
        return GatedLinearAttentionMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        keys, values = self.num_heads * self.key_dim, self.num_heads * self.values
        projections = 2 * d_model * (2 * keys + 3 * values) + 2 * self.gate_rank * (d_model + keys)
        return projections + recurrence_flops(self.num_heads, self.key_dim, self.values, seq_len)

    def state_size(self, d_model: int, seq_len: int) -> int:
        return self.num_heads * self.key_dim * self.values

    @classmethod
    def example(cls) -> tuple["GatedLinearAttention", BuildInfo]:
        config = cls(num_heads=2, key_dim=8, value_dim=16, gate_rank=4, temperature=2.0)
        return config, BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class GatedLinearAttentionMixer(RecurrentMixer):
    def __init__(self, config: GatedLinearAttention, info: BuildInfo):
        self.config = config
        d, h, k, v = info.d_model, config.num_heads, config.key_dim, config.values
        stream, rank = (("embed", d),), ((None, config.gate_rank),)
        keys, values = (("heads", h), ("head_dim", k)), (("heads", h), ("head_dim", v))
        self.query = Linear(stream, keys)
        self.key = Linear(stream, keys)
        self.value = Linear(stream, values)
        self.gate = Linear(stream, values)
        self.decay_in = Linear(stream, rank)
        self.decay_out = Linear(rank, keys, bias=True)
        self.norm = RMSNorm(v)
        self.output = Linear(values, stream, init=fan_in(h * v, scale=info.residual_scale))

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> Any:
        config = self.config
        return empty_state(batch, dtype, memory=(config.num_heads, config.key_dim, config.values))

    def mix(self, x_BTD: jax.Array, row: Row) -> jax.Array:
        pre_decay_BTHK = self.decay_out(self.decay_in(x_BTD).astype(jnp.float32))
        log_decay_BTHK = jax.nn.log_sigmoid(pre_decay_BTHK) / self.config.temperature
        inputs = (self.query(x_BTD), self.key(x_BTD), self.value(x_BTD), log_decay_BTHK)
        q, k, v, log_decay_BTHK = (save_point(x, "recurrence_in") for x in inputs)
        o_BTHV = row.linear_recurrence(q, k, v, log_decay=log_decay_BTHK, implementation=self.config.kernel)
        o_BTHV = save_point(o_BTHV, "recurrence_out")
        return self.output(self.norm(o_BTHV) * jax.nn.silu(self.gate(x_BTD)))
