"""Mamba-2 (SSD, arXiv 2405.21060): a matrix state with one scalar decay per head and input-dependent step sizes."""

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
from mlt.nn.norm import rms_normalize
from mlt.nn.param import fan_in, inverse_softplus_of_step, log_of_uniform, ones, param
from mlt.parallel import ops


class Mamba2(SequenceMixerConfig):
    """h_t = exp(step_t A) h_{t-1} + B_t (step_t x_t)^T;  y_t = h_t^T C_t + D x_t;  out = W norm(y silu(z)).

    B and C are shared by the heads of a group, x is per head. The released fused input projection and convolution
    are kept as separate parameters here, which is the same function and splits over tensor shards.

    Attributes:
        num_heads: heads (H) of width head_dim (P).
        state_dim: rows of the state (N).
        num_groups: groups (G) that share B and C; a divisor of num_heads.
        conv_width: taps of the short convolution on x, B and C.
    """

    context: ClassVar[str] = "carry"
    op: ClassVar[str] = "linear_recurrence"

    num_heads: int
    head_dim: int = 64
    state_dim: int = 128
    num_groups: int = 1
    conv_width: int = 4

    def problems(self) -> Iterator[Problem]:
        for name in ("num_heads", "head_dim", "state_dim", "num_groups", "conv_width"):
            if getattr(self, name) < 1:
                yield Problem(name, getattr(self, name), "must be at least 1")
                return
        if self.num_heads % self.num_groups:
            divisors = ", ".join(str(n) for n in range(1, self.num_heads + 1) if self.num_heads % n == 0)
            yield Problem("num_groups", self.num_groups, f"must divide num_heads = {self.num_heads}", f"use {divisors}")

    def build(self, info: BuildInfo) -> "Mamba2Mixer":
        return Mamba2Mixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        inner, shared = self.num_heads * self.head_dim, self.num_groups * self.state_dim
        projections = 2 * d_model * (3 * inner + 2 * shared + self.num_heads)
        chunk = min(64, seq_len)
        per_head = chunk * (self.state_dim + self.head_dim) + 2 * self.state_dim * self.head_dim
        return projections + 2 * self.conv_width * (inner + 2 * shared) + 2 * self.num_heads * per_head

    def state_size(self, d_model: int, seq_len: int) -> int:
        channels = self.num_heads * self.head_dim + 2 * self.num_groups * self.state_dim
        return self.num_heads * self.head_dim * self.state_dim + (self.conv_width - 1) * channels

    @classmethod
    def example(cls) -> tuple["Mamba2", BuildInfo]:
        config = cls(num_heads=4, head_dim=8, state_dim=16, num_groups=2)
        return config, BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class Mamba2Mixer(Mixer):
    def __init__(self, config: Mamba2, info: BuildInfo):
        self.config = config
        d, h, p, n, g = info.d_model, config.num_heads, config.head_dim, config.state_dim, config.num_groups
        heads, groups = (("heads", h), ("head_dim", p)), ((shared_axis(g), g), ("head_dim", n))
        self.gate = Linear((("embed", d),), heads)
        self.value = Linear((("embed", d),), heads)
        self.write = Linear((("embed", d),), groups)
        self.read = Linear((("embed", d),), groups)
        self.step_size = Linear((("embed", d),), (("heads", h),))
        self.value_conv = CausalConv(heads, width=config.conv_width, bias=True)
        self.write_conv = CausalConv(groups, width=config.conv_width, bias=True)
        self.read_conv = CausalConv(groups, width=config.conv_width, bias=True)
        self.A_log = param((h,), ("heads",), log_of_uniform(1.0, 16.0), group="vector")
        self.dt_bias = param((h,), ("heads",), inverse_softplus_of_step(), group="vector")
        self.skip = param((h,), ("heads",), ones, group="vector")
        self.norm_scale = param((h, p), ("heads", "head_dim"), ones, group="vector")
        self.output = Linear(heads, (("embed", d),), init=fan_in(h * p, scale=info.residual_scale))

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        x = self.value_conv(self.value(x_BTD), ctx)
        write = self.write_conv(self.write(x_BTD), ctx)
        read = self.read_conv(self.read(x_BTD), ctx)
        value, log_decay = self._discretize(x, x_BTD)
        y = ops.linear_recurrence(
            ctx.rules, read, write, value, log_decay=log_decay, segment_ids=ctx.segment_ids, **self._options()
        )
        return self._finish(y, x, x_BTD), {}

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> Any:
        config = self.config
        return {
            "value": self.value_conv.init_state(batch, dtype),
            "write": self.write_conv.init_state(batch, dtype),
            "read": self.read_conv.init_state(batch, dtype),
            "memory": jnp.zeros((batch, config.num_heads, config.state_dim, config.head_dim), jnp.float32),
            "segment": jnp.zeros((batch,), jnp.int32),
        }

    def step(self, x_BTD: jax.Array, state: Any, ctx: Context) -> tuple[jax.Array, Any]:
        keep = resume_segment(state["segment"], ctx.segment_ids)
        halo = {name: keep_where(keep, state[name]) for name in ("value", "write", "read")}
        new = {"segment": ctx.segment_ids[:, -1]}
        x, new["value"] = self.value_conv.step(self.value(x_BTD), ctx.segment_ids, halo["value"])
        write, new["write"] = self.write_conv.step(self.write(x_BTD), ctx.segment_ids, halo["write"])
        read, new["read"] = self.read_conv.step(self.read(x_BTD), ctx.segment_ids, halo["read"])
        value, log_decay = self._discretize(x, x_BTD)
        memory = keep_where(keep, state["memory"])
        y, new["memory"] = linear_recurrence(
            read,
            write,
            value,
            log_decay=log_decay,
            segment_ids=ctx.segment_ids,
            initial_state=memory,
            return_final_state=True,
            **self._options(),
        )
        return self._finish(y, x, x_BTD), new

    def _discretize(self, x_BTHP, stream_BTD):
        step_BTH = jax.nn.softplus(self.step_size(stream_BTD).astype(jnp.float32) + self.dt_bias[...])
        log_decay_BTH = -jnp.exp(self.A_log[...]) * step_BTH
        value_BTHP = (x_BTHP.astype(jnp.float32) * step_BTH[..., None]).astype(x_BTHP.dtype)
        return save_point(value_BTHP, "recurrence_in"), save_point(log_decay_BTH, "recurrence_in")

    def _options(self):
        return {"scale": 1.0, "implementation": self.config.kernel}

    def _finish(self, y_BTHP, x_BTHP, stream_BTD):
        y_BTHP = save_point(y_BTHP, "recurrence_out")
        y_BTHP = y_BTHP + self.skip[...][:, None].astype(y_BTHP.dtype) * x_BTHP
        gated = y_BTHP.astype(jnp.float32) * jax.nn.silu(self.gate(stream_BTD).astype(jnp.float32))
        grouped = gated.reshape(*gated.shape[:2], self.config.num_groups, -1)
        normed = rms_normalize(grouped, eps=1e-5).reshape(gated.shape) * self.norm_scale[...]
        return self.output(normed.astype(stream_BTD.dtype))
