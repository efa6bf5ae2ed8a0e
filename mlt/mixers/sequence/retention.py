"""Retention: linear attention that forgets at a fixed rate a head (RetNet, arXiv 2307.08621) or a learned one (gRet)."""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mlt.config.problems import Problem
from mlt.mixers.base import BuildInfo, SequenceMixerConfig, save_point
from mlt.mixers.recurrent import RecurrentMixer, Row, empty_state
from mlt.mixers.sizes import not_positive, recurrence_flops, rope_problems
from mlt.nn.linear import Linear
from mlt.nn.norm import rms_normalize
from mlt.nn.param import fan_in
from mlt.nn.rope import apply_rope

NORM_EPS = 1e-5


class Retention(SequenceMixerConfig):
    """S_t = a_t S_{t-1} + k_t v_t^T, o_t = S_t^T q_t / sqrt(K), out = W_o (group_norm(o) * silu(x W_g)).

    q and k carry rotary positions, one frequency for each pair of channels. The decay of head h is

        constant    1 - 2^(-5 - h)
        gated       sigmoid(x W_a)^(1/16), the gated retention of YOCO (arXiv 2405.05254)

    The group norm is an RMS norm of each head without learned scale, as in the released code and in gRet; it makes the
    layer independent of the scale of the state. RetNet's xPos factors are the decay itself and are not applied twice.

    Attributes:
        num_heads: heads (H).
        key_dim: width of a query or key (K), even.
        value_dim: width of a value (V); None means twice key_dim, as in RetNet.
        decay: constant or gated.
        rope_base: base of the rotary embedding; None leaves positions out.
    """

    context: ClassVar[str] = "carry"
    op: ClassVar[str] = "linear_recurrence"

    num_heads: int
    key_dim: int
    value_dim: int | None = None
    decay: Literal["constant", "gated"] = "constant"
    rope_base: float | None = 10_000.0

    @property
    def values(self) -> int:
        return self.value_dim or 2 * self.key_dim

    def problems(self) -> Iterator[Problem]:
        yield from not_positive(self, "num_heads", "key_dim", "value_dim")
        yield from rope_problems(self, "key_dim")

    def build(self, info: BuildInfo) -> "RetentionMixer":
        return RetentionMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        keys, values = self.num_heads * self.key_dim, self.num_heads * self.values
        projections = 2 * d_model * (2 * keys + 3 * values + (self.num_heads if self.decay == "gated" else 0))
        return projections + recurrence_flops(self.num_heads, self.key_dim, self.values, seq_len)

    def state_size(self, d_model: int, seq_len: int) -> int:
        return self.num_heads * self.key_dim * self.values

    @classmethod
    def example(cls) -> tuple["Retention", BuildInfo]:
        return cls(num_heads=2, key_dim=8), BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class RetentionMixer(RecurrentMixer):
    def __init__(self, config: Retention, info: BuildInfo):
        self.config = config
        d, h, k, v = info.d_model, config.num_heads, config.key_dim, config.values
        stream, keys, values = (("embed", d),), (("heads", h), ("head_dim", k)), (("heads", h), ("head_dim", v))
        self.query = Linear(stream, keys)
        self.key = Linear(stream, keys)
        self.value = Linear(stream, values)
        self.gate = Linear(stream, values)
        self.decay = Linear(stream, (("heads", h),)) if config.decay == "gated" else None
        self.output = Linear(values, stream, init=fan_in(h * v, scale=info.residual_scale))

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> Any:
        config = self.config
        return empty_state(batch, dtype, memory=(config.num_heads, config.key_dim, config.values))

    def mix(self, x_BTD: jax.Array, row: Row) -> jax.Array:
        config = self.config
        q, k, v = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        if config.rope_base is not None:
            q, k = (apply_rope(x, row.ctx.positions, base=config.rope_base) for x in (q, k))
        if self.decay is None:
            log_decay = jnp.asarray(np.log1p(-(2.0 ** (-5 - np.arange(config.num_heads)))), jnp.float32)
        else:
            log_decay = save_point(jax.nn.log_sigmoid(self.decay(x_BTD).astype(jnp.float32)) / 16, "recurrence_in")
        q, k, v = (save_point(x, "recurrence_in") for x in (q, k, v))
        o_BTHV = row.linear_recurrence(q, k, v, log_decay=log_decay, implementation=config.kernel)
        normed = rms_normalize(save_point(o_BTHV, "recurrence_out"), eps=NORM_EPS).astype(x_BTD.dtype)
        return self.output(normed * jax.nn.silu(self.gate(x_BTD)))
