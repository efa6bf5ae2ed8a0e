"""mLSTM, the matrix memory of xLSTM (arXiv 2405.04517, 2503.13427): an exponential input gate and a normalizer state."""

from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mlt.config.problems import Problem
from mlt.mixers.base import BuildInfo, SequenceMixerConfig, save_point
from mlt.mixers.recurrent import RecurrentMixer, Row, empty_normalized, empty_state
from mlt.mixers.sizes import not_positive, recurrence_flops
from mlt.nn.head_norm import HeadNorm, Kind
from mlt.nn.linear import Linear
from mlt.nn.param import constant, given, normal, param, zeros


class MLSTM(SequenceMixerConfig):
    """C_t = f_t C_{t-1} + e^{i_t} k_t v_t^T, n_t the same of keys alone, h_t = C_t^T q_t / max(|n_t . q_t|, 1).

    q is scaled by 1/sqrt(K), f_t = sigmoid of its pre-activation, i_t and that pre-activation are soft-capped, and
    out = W_o (sigmoid(x W_og) * norm(h)). A running maximum is taken out of the exponentials, so that C and n are finite
    whatever the gates; published code adds 1e-6 to the denominator, which is bounded by itself here.

    This is the layer of the 7B model: no convolution, no inner up-projection. Gate kernels start at zero with biases
    -10 (input) and 3 to 6 over the heads (forget); other inits are the paper's, the output's with half the sub-layers
    as the number of blocks.

    Attributes:
        num_heads: heads (H).
        key_dim: width of a query or key (K).
        value_dim: width of a value (V); None means twice key_dim.
        gate_soft_cap: gate pre-activations become cap * tanh(pre / cap).
        norm: of each head; layer norm in the papers and in released layers.
    """

    context: ClassVar[str] = "carry"
    op: ClassVar[str] = "linear_recurrence"

    num_heads: int
    key_dim: int
    value_dim: int | None = None
    gate_soft_cap: float = 15.0
    norm: Kind = "layer"

    @property
    def values(self) -> int:
        return self.value_dim or 2 * self.key_dim

    def problems(self) -> Iterator[Problem]:
        yield from not_positive(self, "num_heads", "key_dim", "value_dim")
        if self.gate_soft_cap <= 0:
            yield Problem("gate_soft_cap", self.gate_soft_cap, "must be positive")

    def build(self, info: BuildInfo) -> "MLSTMMixer":
        return MLSTMMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        keys, values = self.num_heads * self.key_dim, self.num_heads * self.values
        projections = 2 * d_model * (2 * keys + 3 * values + 2 * self.num_heads)
        return projections + recurrence_flops(self.num_heads, self.key_dim, self.values, seq_len)

    def state_size(self, d_model: int, seq_len: int) -> int:
        return self.num_heads * (self.key_dim * self.values + self.key_dim + 1)

    @classmethod
    def example(cls) -> tuple["MLSTM", BuildInfo]:
        return cls(num_heads=2, key_dim=8, value_dim=16), BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class MLSTMMixer(RecurrentMixer):
    def __init__(self, config: MLSTM, info: BuildInfo):
        self.config = config
        d, h, k, v = info.d_model, config.num_heads, config.key_dim, config.values
        stream, keys, values = (("embed", d),), (("heads", h), ("head_dim", k)), (("heads", h), ("head_dim", v))
        small = normal((2 / (5 * d)) ** 0.5)
        self.query = Linear(stream, keys, init=small)
        self.key = Linear(stream, keys, init=small)
        self.value = Linear(stream, values, init=small)
        self.gate = Linear(stream, values, init=small)
        self.input_gate = Linear(stream, (("heads", h),), init=zeros)
        self.forget_gate = Linear(stream, (("heads", h),), init=zeros)
        self.input_bias = param((h,), ("heads",), constant(-10.0))
        self.forget_bias = param((h,), ("heads",), given(np.linspace(3.0, 6.0, h), "linspace(3, 6)"))
        self.norm = HeadNorm(h, v, kind=config.norm)
        blocks = max(info.num_sub_layers / 2, 1)
        self.output = Linear(values, stream, init=normal(2 / (blocks * d**0.5)))

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> Any:
        config = self.config
        return empty_state(batch, dtype, memory=empty_normalized(batch, config.num_heads, config.key_dim, config.values))

    def mix(self, x_BTD: jax.Array, row: Row) -> jax.Array:
        cap = self.config.gate_soft_cap
        input_BTH = self.input_gate(x_BTD).astype(jnp.float32) + self.input_bias[...]
        forget_BTH = self.forget_gate(x_BTD).astype(jnp.float32) + self.forget_bias[...]
        input_BTH, forget_BTH = (cap * jnp.tanh(gate / cap) for gate in (input_BTH, forget_BTH))
        inputs = (self.query(x_BTD), self.key(x_BTD), self.value(x_BTD), input_BTH, jax.nn.log_sigmoid(forget_BTH))
        q, k, v, input_BTH, log_decay_BTH = (save_point(x, "recurrence_in") for x in inputs)
        h_BTHV = row.linear_recurrence(
            q, k, v, log_decay=log_decay_BTH, log_input=input_BTH, normalizer="mlstm", implementation=self.config.kernel
        )
        h_BTHV = save_point(h_BTHV, "recurrence_out")
        return self.output(jax.nn.sigmoid(self.gate(x_BTD)) * self.norm(h_BTHV))
