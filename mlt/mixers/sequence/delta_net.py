"""DeltaNet (arXiv 2406.06484): a matrix state that never forgets and writes by error, the gated delta rule's ancestor."""

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
from mlt.nn.param import fan_in


class DeltaNet(SequenceMixerConfig):
    """S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = S_t^T q_t / sqrt(K), out = W_o norm(o).

    q, k and v pass a short convolution and SiLU; q and k are then L2-normalized; beta_t = sigmoid(x W_b). The norm's
    scale is shared by the heads, and there is no output gate.

    Attributes:
        num_heads: heads (H).
        key_dim: width of a query or key (K).
        value_dim: width of a value (V); None means key_dim.
        conv_width: taps of the short convolutions on q, k and v.
        negative_eigenvalues: beta in (0, 2) in place of (0, 1), which lets the state flip sign (arXiv 2411.12537).
    """

    context: ClassVar[str] = "carry"
    op: ClassVar[str] = "linear_recurrence"

    num_heads: int
    key_dim: int
    value_dim: int | None = None
    conv_width: int = 4
    negative_eigenvalues: bool = False

    @property
    def values(self) -> int:
        return self.value_dim or self.key_dim

    def problems(self) -> Iterator[Problem]:
        yield from not_positive(self, "num_heads", "key_dim", "value_dim", "conv_width")

    def build(self, info: BuildInfo) -> "DeltaNetMixer":
        return DeltaNetMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        keys, values = self.num_heads * self.key_dim, self.num_heads * self.values
        projections = 2 * d_model * (2 * keys + 2 * values + self.num_heads) + 2 * self.conv_width * (2 * keys + values)
        return projections + recurrence_flops(self.num_heads, self.key_dim, self.values, seq_len, rule="delta")

    def state_size(self, d_model: int, seq_len: int) -> int:
        channels = self.num_heads * (2 * self.key_dim + self.values)
        return self.num_heads * self.key_dim * self.values + (self.conv_width - 1) * channels

    @classmethod
    def example(cls) -> tuple["DeltaNet", BuildInfo]:
        return cls(num_heads=2, key_dim=8, value_dim=16), BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class DeltaNetMixer(RecurrentMixer):
    def __init__(self, config: DeltaNet, info: BuildInfo):
        self.config = config
        d, h, k, v = info.d_model, config.num_heads, config.key_dim, config.values
        stream, keys, values = (("embed", d),), (("heads", h), ("head_dim", k)), (("heads", h), ("head_dim", v))
        self.query = Linear(stream, keys)
        self.key = Linear(stream, keys)
        self.value = Linear(stream, values)
        self.beta = Linear(stream, (("heads", h),))
        self.query_conv = CausalConv(keys, width=config.conv_width)
        self.key_conv = CausalConv(keys, width=config.conv_width)
        self.value_conv = CausalConv(values, width=config.conv_width)
        self.norm = RMSNorm(v)
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
        if self.config.negative_eigenvalues:
            beta_BTH = 2.0 * beta_BTH
        q, k, v, beta_BTH = (save_point(x, "recurrence_in") for x in (q, k, v, beta_BTH))
        o_BTHV = row.linear_recurrence(q, k, v, beta=beta_BTH, rule="delta", implementation=self.config.kernel)
        return self.output(self.norm(save_point(o_BTHV, "recurrence_out")))
