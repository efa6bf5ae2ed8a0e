"""Mamba-2 (SSD, arXiv 2405.21060): a matrix state with one scalar decay per head and input-dependent step sizes."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from mlt.config.problems import Problem
from mlt.mixers.base import BuildInfo, Published, SequenceMixerConfig, save_point, shared_axis
from mlt.mixers.conv import CausalConv
from mlt.mixers.recurrent import PublishingMixer, Row, empty_state, published_memory
from mlt.mixers.sizes import not_divisor, not_positive, recurrence_flops
from mlt.nn.linear import Linear
from mlt.nn.norm import rms_normalize
from mlt.nn.param import fan_in, inverse_softplus_of_step, log_of_uniform, ones, param


class Mamba2(SequenceMixerConfig):
    """h_t = exp(step_t A) h_{t-1} + B_t (step_t x_t)^T;  y_t = h_t^T C_t + D x_t;  out = W norm(y silu(z)).

    B and C are shared by the heads of a group, x is per head. The released fused input projection and convolution
    are kept as separate parameters here, which is the same function and splits over tensor shards.

    Attributes:
        num_heads: heads (H) of width head_dim (P).
        state_dim: rows of the state (N).
        num_groups: groups (G) that share B and C; a divisor of num_heads.
        conv_width: taps of the short convolution on x, B and C.
        conv_bias: biases on it.
        norm: of y, one group at a time: after the gate, before it, or none.
        norm_eps: of that norm.
        step_limit: lowest and highest step size, the second None for no highest; None leaves steps as they are.
        projection_scales: factors on the projections z, x, B, C and step; None means 1.
        publish: name under which later layers may read y, as `memory`; None publishes nothing.
    """

    context: ClassVar[str] = "carry"
    op: ClassVar[str] = "linear_recurrence"

    num_heads: int
    head_dim: int = 64
    state_dim: int = 128
    num_groups: int = 1
    conv_width: int = 4
    conv_bias: bool = True
    norm: Literal["after_gate", "before_gate", "none"] = "after_gate"
    norm_eps: float = 1e-5
    step_limit: tuple[float, float | None] | None = None
    projection_scales: tuple[float, float, float, float, float] | None = None
    publish: str | None = None

    def problems(self) -> Iterator[Problem]:
        sizes = list(not_positive(self, "num_heads", "head_dim", "state_dim", "num_groups", "conv_width"))
        yield from sizes or not_divisor(self, "num_groups", "num_heads")
        if self.step_limit is not None:
            low, high = self.step_limit
            if low < 0 or (high is not None and high <= low):
                yield Problem("step_limit", self.step_limit, "must be a lower and a higher number, neither negative")

    def build(self, info: BuildInfo) -> "Mamba2Mixer":
        return Mamba2Mixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        inner, shared = self.num_heads * self.head_dim, self.num_groups * self.state_dim
        projections = 2 * d_model * (3 * inner + 2 * shared + self.num_heads)
        recurrence = recurrence_flops(self.num_heads, self.state_dim, self.head_dim, seq_len)
        return projections + 2 * self.conv_width * (inner + 2 * shared) + recurrence

    def state_size(self, d_model: int, seq_len: int) -> int:
        channels = self.num_heads * self.head_dim + 2 * self.num_groups * self.state_dim
        return self.num_heads * self.head_dim * self.state_dim + (self.conv_width - 1) * channels

    def publishes(self, d_model: int) -> Mapping[str, Published]:
        return published_memory(self.publish, self.num_heads * self.head_dim)

    @classmethod
    def example(cls) -> tuple["Mamba2", BuildInfo]:
        config = cls(num_heads=4, head_dim=8, state_dim=16, num_groups=2)
        return config, BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class Mamba2Mixer(PublishingMixer):
    def __init__(self, config: Mamba2, info: BuildInfo):
        self.config = config
        d, h, p, n, g = info.d_model, config.num_heads, config.head_dim, config.state_dim, config.num_groups
        heads, groups = (("heads", h), ("head_dim", p)), ((shared_axis(g), g), ("head_dim", n))
        self.gate = Linear((("embed", d),), heads)
        self.value = Linear((("embed", d),), heads)
        self.write = Linear((("embed", d),), groups)
        self.read = Linear((("embed", d),), groups)
        self.step_size = Linear((("embed", d),), (("heads", h),))
        self.value_conv = CausalConv(heads, width=config.conv_width, bias=config.conv_bias)
        self.write_conv = CausalConv(groups, width=config.conv_width, bias=config.conv_bias)
        self.read_conv = CausalConv(groups, width=config.conv_width, bias=config.conv_bias)
        self.A_log = param((h,), ("heads",), log_of_uniform(1.0, 16.0), group="vector")
        self.dt_bias = param((h,), ("heads",), inverse_softplus_of_step(), group="vector")
        self.skip = param((h,), ("heads",), ones, group="vector")
        scale = param((h, p), ("heads", "head_dim"), ones, group="vector")
        self.norm_scale = None if config.norm == "none" else scale
        self.output = Linear(heads, (("embed", d),), init=fan_in(h * p, scale=info.residual_scale))

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> Any:
        config = self.config
        convs = {"value": self.value_conv, "write": self.write_conv, "read": self.read_conv}
        return empty_state(batch, dtype, convs, memory=(config.num_heads, config.state_dim, config.head_dim))

    def mix(self, x_BTD: jax.Array, row: Row) -> jax.Array:
        projections = [p(x_BTD) for p in (self.gate, self.value, self.write, self.read, self.step_size)]
        if self.config.projection_scales is not None:
            projections = [p * scale for p, scale in zip(projections, self.config.projection_scales, strict=True)]
        gate_BTHP, value_BTHP, write_BTGN, read_BTGN, step_BTH = projections
        x_BTHP = row.conv("value", self.value_conv, value_BTHP)
        write_BTGN = row.conv("write", self.write_conv, write_BTGN)
        read_BTGN = row.conv("read", self.read_conv, read_BTGN)
        step_BTH = jax.nn.softplus(step_BTH.astype(jnp.float32) + self.dt_bias[...])
        if self.config.step_limit is not None:
            step_BTH = jnp.clip(step_BTH, *self.config.step_limit)
        log_decay_BTH = save_point(-jnp.exp(self.A_log[...]) * step_BTH, "recurrence_in")
        value_BTHP = save_point((x_BTHP.astype(jnp.float32) * step_BTH[..., None]).astype(x_BTHP.dtype), "recurrence_in")
        y_BTHP = row.linear_recurrence(
            read_BTGN, write_BTGN, value_BTHP, log_decay=log_decay_BTH, scale=1.0, implementation=self.config.kernel
        )
        y_BTHP = save_point(y_BTHP, "recurrence_out")
        y_BTHP = (y_BTHP + self.skip[...][:, None] * x_BTHP).astype(y_BTHP.dtype)
        row.publish(self.config.publish, memory=y_BTHP.reshape(*y_BTHP.shape[:2], -1))
        return self.output(self._gated(y_BTHP.astype(jnp.float32), gate_BTHP).astype(x_BTD.dtype))

    def _gated(self, y_BTHP: jax.Array, gate_BTHP: jax.Array) -> jax.Array:
        """y silu(gate) with the norm where the config puts it, float32."""
        gate_BTHP = jax.nn.silu(gate_BTHP.astype(jnp.float32))
        if self.config.norm == "none":
            return y_BTHP * gate_BTHP
        if self.config.norm == "before_gate":
            return self._norm(y_BTHP) * gate_BTHP
        return self._norm(y_BTHP * gate_BTHP)

    def _norm(self, y_BTHP: jax.Array) -> jax.Array:
        grouped = y_BTHP.reshape(*y_BTHP.shape[:2], self.config.num_groups, -1)
        return rms_normalize(grouped, eps=self.config.norm_eps).reshape(y_BTHP.shape) * self.norm_scale[...]
