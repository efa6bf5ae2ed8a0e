"""RG-LRU (Griffin, arXiv 2402.19427): a gated recurrence of one number a channel whose input keeps the state's variance."""

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mlt.config.problems import Problem
from mlt.errors import UserError
from mlt.mixers.base import BuildInfo, SequenceMixerConfig, save_point
from mlt.mixers.conv import CausalConv
from mlt.mixers.recurrent import RecurrentMixer, Row, empty_state
from mlt.mixers.sizes import not_divisor, not_positive
from mlt.nn.linear import Linear
from mlt.nn.param import Init, fan_in, normal, param, zeros

SHARPNESS = 8.0
"""c of the paper."""
MAX_SLOPE = 1000.0
"""Bound on the derivative of the square root in the backward pass, as released."""


class RGLRU(SequenceMixerConfig):
    """Griffin's recurrent block: out = W_o (gelu(x W_y) * h), where u = conv(x W_x) and, for each channel,

        r_t, i_t = sigmoid(u_t W_r + b_r), sigmoid(u_t W_i + b_i);  log a_t = -8 r_t softplus(Lambda)
        h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t u_t;   at the first token of a document h_t = i_t u_t

    W_r and W_i are block-diagonal, one block a head. exp(-softplus(Lambda)) starts with its square uniform between 0.9^2
    and 0.999^2. The derivative of the square root is bounded by 1000 in the backward pass. GELU is its tanh form.

    Attributes:
        num_heads: blocks of the gates (H), a divisor of the width.
        width: channels of the recurrence; None means d_model.
        conv_width: taps of the short convolution.
        bias: biases on W_x, W_y and W_o, as released.
    """

    context: ClassVar[str] = "carry"
    op: ClassVar[str] = "diagonal_recurrence"

    num_heads: int
    width: int | None = None
    conv_width: int = 4
    bias: bool = True

    def problems(self) -> Iterator[Problem]:
        sizes = list(not_positive(self, "num_heads", "width", "conv_width"))
        yield from sizes or (not_divisor(self, "num_heads", "width") if self.width is not None else ())

    def channels(self, d_model: int) -> int:
        return d_model if self.width is None else self.width

    def build(self, info: BuildInfo) -> "RGLRUMixer":
        return RGLRUMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        width = self.channels(d_model)
        gates = 4 * width * width / self.num_heads
        return 6 * d_model * width + 2 * self.conv_width * width + gates + 12 * width

    def state_size(self, d_model: int, seq_len: int) -> int:
        return self.conv_width * self.channels(d_model)

    @classmethod
    def example(cls) -> tuple["RGLRU", BuildInfo]:
        return cls(num_heads=4, width=64), BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class RGLRUMixer(RecurrentMixer):
    def __init__(self, config: RGLRU, info: BuildInfo):
        self.config = config
        d, h, width = info.d_model, config.num_heads, config.channels(info.d_model)
        if width % h:
            raise UserError(f"RGLRU: num_heads = {h} must divide the width {width}; change num_heads or set width")
        self.block = width // h
        stream, heads = (("embed", d),), (("heads", h), ("head_dim", self.block))
        self.gate = Linear(stream, heads, bias=config.bias)
        self.value = Linear(stream, heads, bias=config.bias)
        tap = normal(math.sqrt(0.01 / config.conv_width))
        self.conv = CausalConv(heads, width=config.conv_width, activation=None, bias=True, init=tap)
        self.forget = param((h, self.block, self.block), ("heads", "head_dim", None), fan_in(self.block))
        self.forget_bias = param((h, self.block), ("heads", "head_dim"), zeros, group="vector")
        self.write = param((h, self.block, self.block), ("heads", "head_dim", None), fan_in(self.block))
        self.write_bias = param((h, self.block), ("heads", "head_dim"), zeros, group="vector")
        self.decay = param((h, self.block), ("heads", "head_dim"), _ring(0.9, 0.999), group="vector")
        self.output = Linear(heads, stream, init=fan_in(width, scale=info.residual_scale), bias=config.bias)

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> Any:
        return empty_state(batch, dtype, {"halo": self.conv}, memory=(self.config.num_heads, self.block))

    def mix(self, x_BTD: jax.Array, row: Row) -> jax.Array:
        u_BTHP = row.conv("halo", self.conv, self.value(x_BTD))
        forget_BTHP = self._gate(u_BTHP, self.forget, self.forget_bias)
        write_BTHP = self._gate(u_BTHP, self.write, self.write_bias)
        log_a_BTHP = -SHARPNESS * forget_BTHP * jax.nn.softplus(self.decay[...])
        first_BT11 = (row.ctx.positions == 0)[..., None, None]
        scale_BTHP = jnp.where(first_BT11, 1.0, bounded_sqrt(-jnp.expm1(2 * log_a_BTHP)))
        a_BTHP = save_point(jnp.where(first_BT11, 0.0, jnp.exp(log_a_BTHP)), "recurrence_in")
        b_BTHP = save_point(scale_BTHP * write_BTHP * u_BTHP.astype(jnp.float32), "recurrence_in")
        h_BTHP = row.diagonal_recurrence(a_BTHP, b_BTHP, implementation=self.config.kernel)
        h_BTHP = save_point(h_BTHP, "recurrence_out").astype(x_BTD.dtype)
        return self.output(jax.nn.gelu(self.gate(x_BTD)) * h_BTHP)

    def _gate(self, u_BTHP: jax.Array, blocks: Any, bias: Any) -> jax.Array:
        weights = blocks[...].astype(u_BTHP.dtype)
        pre = jnp.einsum("bthi,hio->btho", u_BTHP, weights, preferred_element_type=jnp.float32)
        return jax.nn.sigmoid(pre + bias[...])


@jax.custom_vjp
def bounded_sqrt(x: jax.Array) -> jax.Array:
    """sqrt(x), with a derivative of at most `MAX_SLOPE`."""
    return jnp.sqrt(x)


def _bounded_sqrt_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.sqrt(x), x


def _bounded_sqrt_backward(x: jax.Array, ct: jax.Array) -> tuple[jax.Array]:
    return (ct * jax.lax.rsqrt(jnp.maximum(4 * x, MAX_SLOPE**-2)),)


bounded_sqrt.defvjp(_bounded_sqrt_forward, _bounded_sqrt_backward)


def _ring(low: float, high: float) -> Init:
    """softplus^-1 of -log(radius), the radius squared being uniform in [low^2, high^2]."""

    def fn(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        rate = -0.5 * np.log(rng.uniform(low**2, high**2, shape) + 1e-8)
        return np.log(np.expm1(rate))

    return Init(f"softplus_inverse_ring({low:g}, {high:g})", fn)
