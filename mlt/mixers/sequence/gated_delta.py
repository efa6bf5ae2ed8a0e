"""Gated delta rule (Gated DeltaNet, arXiv 2412.06464): a matrix state that forgets by a scalar and writes by error."""

from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from mlt_kernels import linear_recurrence

from mlt.config.problems import Problem
from mlt.mixers.base import (
    Aux,
    BuildInfo,
    Context,
    Mixer,
    SequenceMixerConfig,
    keep_where,
    resume_segment,
    save_point,
    shared_axis,
)
from mlt.mixers.conv import CausalConv
from mlt.nn.linear import Linear
from mlt.nn.norm import RMSNorm, l2_normalize
from mlt.nn.param import fan_in, inverse_softplus_of_step, log_of_uniform, param
from mlt.parallel import ops


class GatedDelta(SequenceMixerConfig):
    """S_t = e^{g_t} (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, read by q_t / sqrt(K) after the write.

    q and k are L2-normalized; g_t = -exp(A_log) softplus(x W_a + dt_bias); beta_t = sigmoid(x W_b).

    Attributes:
        num_heads: value heads (H).
        num_key_heads: query and key heads, a divisor of num_heads; None means num_heads.
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
    num_key_heads: int | None = None
    conv_width: int = 4
    negative_eigenvalues: bool = False

    @property
    def key_heads(self) -> int:
        return self.num_key_heads or self.num_heads

    @property
    def values(self) -> int:
        return self.value_dim or self.key_dim

    def problems(self) -> Iterator[Problem]:
        for name in ("num_heads", "key_dim", "value_dim", "num_key_heads", "conv_width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield Problem(name, value, "must be at least 1")
                return
        if self.num_heads % self.key_heads:
            divisors = ", ".join(str(n) for n in range(1, self.num_heads + 1) if self.num_heads % n == 0)
            yield Problem("num_key_heads", self.num_key_heads, f"must divide num_heads = {self.num_heads}", f"use {divisors}")

    def build(self, info: BuildInfo) -> "GatedDeltaMixer":
        return GatedDeltaMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        keys, values = self.key_heads * self.key_dim, self.num_heads * self.values
        projections = 2 * d_model * (2 * keys + 3 * values + 2 * self.num_heads)
        chunk = min(64, seq_len)
        per_head = chunk * (3 * self.key_dim + 2 * self.values) + chunk**2 / 3 + 3 * self.key_dim * self.values
        return projections + 2 * self.conv_width * (2 * keys + values) + 2 * self.num_heads * per_head

    def state_size(self, d_model: int, seq_len: int) -> int:
        channels = 2 * self.key_heads * self.key_dim + self.num_heads * self.values
        return self.num_heads * self.key_dim * self.values + (self.conv_width - 1) * channels

    @classmethod
    def example(cls) -> tuple["GatedDelta", BuildInfo]:
        config = cls(num_heads=4, num_key_heads=2, key_dim=8, value_dim=16, negative_eigenvalues=True)
        return config, BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class GatedDeltaMixer(Mixer):
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
        self.norm = RMSNorm(v)
        self.output = Linear(values, (("embed", d),), init=fan_in(h * v, scale=info.residual_scale))

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        q, k, v = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        q = self.query_conv(q, ctx)
        k = self.key_conv(k, ctx)
        v = self.value_conv(v, ctx)
        q, k, v, gates = self._recurrence_inputs(q, k, v, x_BTD)
        o = ops.linear_recurrence(ctx.rules, q, k, v, segment_ids=ctx.segment_ids, **gates, **self._options())
        return self._finish(o, x_BTD), {}

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> Any:
        config = self.config
        return {
            "query": self.query_conv.init_state(batch, dtype),
            "key": self.key_conv.init_state(batch, dtype),
            "value": self.value_conv.init_state(batch, dtype),
            "memory": jnp.zeros((batch, config.num_heads, config.key_dim, config.values), jnp.float32),
            "segment": jnp.zeros((batch,), jnp.int32),
        }

    def step(self, x_BTD: jax.Array, state: Any, ctx: Context) -> tuple[jax.Array, Any]:
        keep = resume_segment(state["segment"], ctx.segment_ids)
        halo = {name: keep_where(keep, state[name]) for name in ("query", "key", "value")}
        new = {"segment": ctx.segment_ids[:, -1]}
        q, new["query"] = self.query_conv.step(self.query(x_BTD), ctx.segment_ids, halo["query"])
        k, new["key"] = self.key_conv.step(self.key(x_BTD), ctx.segment_ids, halo["key"])
        v, new["value"] = self.value_conv.step(self.value(x_BTD), ctx.segment_ids, halo["value"])
        q, k, v, gates = self._recurrence_inputs(q, k, v, x_BTD)
        memory = keep_where(keep, state["memory"])
        o, new["memory"] = linear_recurrence(
            q,
            k,
            v,
            segment_ids=ctx.segment_ids,
            initial_state=memory,
            return_final_state=True,
            **gates,
            **self._options(),
        )
        return self._finish(o, x_BTD), new

    def _recurrence_inputs(self, q, k, v, x_BTD):
        q, k = l2_normalize(q), l2_normalize(k)
        pre_decay = self.decay(x_BTD).astype(jnp.float32) + self.dt_bias[...]
        log_decay_BTH = -jnp.exp(self.A_log[...]) * jax.nn.softplus(pre_decay)
        beta_BTH = jax.nn.sigmoid(self.beta(x_BTD).astype(jnp.float32))
        if self.config.negative_eigenvalues:
            beta_BTH = 2.0 * beta_BTH
        q, k, v, log_decay_BTH, beta_BTH = (save_point(x, "recurrence_in") for x in (q, k, v, log_decay_BTH, beta_BTH))
        return q, k, v, {"log_decay": log_decay_BTH, "beta": beta_BTH}

    def _options(self):
        return {"rule": "delta", "implementation": self.config.kernel}

    def _finish(self, o_BTHV, x_BTD):
        o_BTHV = save_point(o_BTHV, "recurrence_out")
        return self.output(self.norm(o_BTHV) * jax.nn.silu(self.gate(x_BTD)))
