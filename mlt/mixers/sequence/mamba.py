"""Mamba (S6, arXiv 2312.00752): input-dependent step sizes drive N real decays a channel, read and written by the token."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import mlt_kernels
import numpy as np

from mlt.config.problems import Problem
from mlt.mixers.base import BuildInfo, Published, SequenceMixerConfig, save_point
from mlt.mixers.conv import CausalConv
from mlt.mixers.recurrent import Continuation, PublishingMixer, Row, empty_state, published_memory
from mlt.mixers.sizes import not_positive
from mlt.nn.linear import Linear
from mlt.nn.norm import RMSNorm
from mlt.nn.param import given, inverse_softplus_of_step, ones, param, uniform
from mlt.parallel import ops


class Mamba(SequenceMixerConfig):
    """h_t = exp(step_t A) h_{t-1} + step_t x_t B_t;  y_t = C_t h_t + D x_t;  out = W_o (y silu(z)), for each channel

        x = silu(conv(u W_x)), z = u W_z;  [r, B, C] = x W;  step = softplus(r W_step + dt_bias);  A = -exp(A_log)

    B and C are shared by all channels. A starts at -1 .. -N on every channel (S4D-Real), steps log-uniform in
    [0.001, 0.1]. The released fused projections are kept as separate parameters: the same function, and it splits over
    tensor shards by channels.

    Attributes:
        inner: channels (D_i); None means twice d_model.
        state_dim: states a channel (N).
        step_rank: width of r; None means d_model / 16, rounded up.
        conv_width: taps of the short convolution.
        conv_bias: a bias on it.
        inner_norm: RMS norms on r, B and C, as in Jamba and Falcon-Mamba; they keep models beyond 1B stable.
        norm_eps: of those norms.
        publish: name under which later layers may read y, as `memory` (SambaY's gated memory units); None publishes nothing.
    """

    context: ClassVar[str] = "carry"
    op: ClassVar[str] = "selective_scan"

    inner: int | None = None
    state_dim: int = 16
    step_rank: int | None = None
    conv_width: int = 4
    conv_bias: bool = True
    inner_norm: bool = False
    norm_eps: float = 1e-6
    publish: str | None = None

    def problems(self) -> Iterator[Problem]:
        yield from not_positive(self, "inner", "state_dim", "step_rank", "conv_width")

    def channels(self, d_model: int) -> int:
        return 2 * d_model if self.inner is None else self.inner

    def rank(self, d_model: int) -> int:
        return -(-d_model // 16) if self.step_rank is None else self.step_rank

    def build(self, info: BuildInfo) -> "MambaMixer":
        return MambaMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        inner, rank = self.channels(d_model), self.rank(d_model)
        projections = 6 * d_model * inner + 2 * inner * (2 * rank + 2 * self.state_dim)
        return projections + 2 * self.conv_width * inner + 8 * inner * self.state_dim

    def state_size(self, d_model: int, seq_len: int) -> int:
        return self.channels(d_model) * (self.state_dim + self.conv_width - 1)

    def publishes(self, d_model: int) -> Mapping[str, Published]:
        return published_memory(self.publish, self.channels(d_model))

    @classmethod
    def example(cls) -> tuple["Mamba", BuildInfo]:
        return cls(inner_norm=True, state_dim=4), BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class MambaMixer(PublishingMixer):
    def __init__(self, config: Mamba, info: BuildInfo):
        self.config = config
        d, n = info.d_model, config.state_dim
        self.inner, rank = config.channels(d), config.rank(d)
        stream, channels = (("embed", d),), (("heads", self.inner),)
        self.value = Linear(stream, channels)
        self.gate = Linear(stream, channels)
        self.conv = CausalConv(channels, width=config.conv_width, bias=config.conv_bias)
        self.step_in = Linear(channels, ((None, rank),))
        self.write = Linear(channels, ((None, n),))
        self.read = Linear(channels, ((None, n),))
        self.step_out = Linear(((None, rank),), channels, init=uniform(-(rank**-0.5), rank**-0.5))
        norm = (lambda size: RMSNorm(size, eps=config.norm_eps)) if config.inner_norm else (lambda _: None)
        self.step_norm, self.write_norm, self.read_norm = norm(rank), norm(n), norm(n)
        start = given(np.log(np.arange(1, n + 1)), f"log(1..{n})")
        self.A_log = param((self.inner, n), ("heads", None), start, group="vector")
        self.dt_bias = param((self.inner,), ("heads",), inverse_softplus_of_step(), group="vector")
        self.skip = param((self.inner,), ("heads",), ones, group="vector")
        bound = self.inner**-0.5 * info.residual_scale
        self.output = Linear(channels, stream, init=uniform(-bound, bound))

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> Any:
        return empty_state(batch, dtype, {"halo": self.conv}, memory=(self.inner, self.config.state_dim))

    def mix(self, x_BTD: jax.Array, row: Row) -> jax.Array:
        x_BTI = row.conv("halo", self.conv, self.value(x_BTD))
        normed = lambda norm, value: value if norm is None else norm(value)  # noqa: E731
        step_BTR = normed(self.step_norm, self.step_in(x_BTI))
        write_BTN, read_BTN = normed(self.write_norm, self.write(x_BTI)), normed(self.read_norm, self.read(x_BTI))
        step_BTI = jax.nn.softplus(self.step_out(step_BTR).astype(jnp.float32) + self.dt_bias[...])
        x_BTI, step_BTI = save_point(x_BTI, "recurrence_in"), save_point(step_BTI, "recurrence_in")
        arrays = (x_BTI, step_BTI, -jnp.exp(self.A_log[...]), write_BTN, read_BTN)
        y_BTI = selective_scan(row, *arrays, skip=self.skip[...], implementation=self.config.kernel)
        row.publish(self.config.publish, memory=y_BTI)
        return self.output(save_point(y_BTI, "recurrence_out") * jax.nn.silu(self.gate(x_BTD)))


def selective_scan(row: Row, *arrays: jax.Array, name: str = "memory", **options: Any) -> jax.Array:
    """`mlt_kernels.selective_scan` of x, step, A, B and C, whose state the decoding state keeps as `name`."""
    segment_ids = row.ctx.segment_ids
    if not isinstance(row, Continuation):
        return ops.selective_scan(row.ctx.rules, *arrays, segment_ids=segment_ids, **options)
    start = row.state[name]
    y, row.new[name] = mlt_kernels.selective_scan(
        *arrays, segment_ids=segment_ids, initial_state=start, return_final_state=True, **options
    )
    return y
