"""Moneta, Yaad and Memora (Miras, arXiv 2504.13173): memories with other losses and other ways to forget."""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from mlt_kernels.test_time_memory import MemorySpec

from mlt.config.problems import Problem
from mlt.mixers.base import BuildInfo, SequenceMixerConfig, save_point
from mlt.mixers.conv import CausalConv
from mlt.mixers.recurrent import RecurrentMixer, Row, empty_state
from mlt.mixers.sizes import not_positive
from mlt.mixers.test_time import FastWeights, inverse_softplus, log_forget, logit, memory_flops, memory_values
from mlt.nn.linear import Linear
from mlt.nn.norm import RMSNorm, l2_normalize
from mlt.nn.param import constant, fan_in, normal, param


class Miras(SequenceMixerConfig):
    """A_t = (1 - alpha_t) A_{t-1} - eta_t dl/dW, W = link(A), o_t = q_t + LN(gelu(q_t W_1) W_2).

        member    l(y, v), r = y - v                              W                          a token reads
        "moneta"  sum |r|^power                                   A / |A|_q^(q-2)            its own write too
        "yaad"    |r|^2 / 2 to |r| = delta, delta sum |r| beyond  A                          its own write too
        "memora"  |r|^2                                           softmax(A), rows           the chunk's first weights

    Gradients are taken at the memory that enters each chunk of a document. q, k and v go through a short convolution and SiLU,
    q and k are L2-normalized. eta = max_step sigmoid(x W) / head_dim, alpha = sigmoid(x W + b) with b starting at
    logit(0.01), delta = softplus(x W + b) starting at 1. The answer is normed and gated by SiLU of the input.

    Attributes:
        member: which of the three.
        num_heads: memories side by side (H).
        head_dim: width of a query, key and value.
        hidden_mult: hidden width over head_dim.
        chunk_size: tokens between two points where gradients are taken. Part of the model.
        power: p of Moneta's loss.
        link: Moneta's: "pnorm" as printed, which grows as A shrinks; "mirror", the exact mirror map, read at the chunk's first
            weights; "norm_cap", A scaled down to |A|_q = 1 where it is larger.
        link_power: q of Moneta's link.
        loss: Yaad's: "huber_mix" as printed, which jumps at the threshold, or "huber_norm", which does not.
        max_step: largest step times head_dim.
        conv_width: taps of the short convolutions.
    """

    context: ClassVar[str] = "none"
    op: ClassVar[str] = "test_time_memory"

    member: Literal["moneta", "yaad", "memora"]
    num_heads: int
    head_dim: int
    hidden_mult: int = 4
    chunk_size: int = 16
    power: float = 3.0
    link: Literal["pnorm", "mirror", "norm_cap"] = "pnorm"
    link_power: float = 4.0
    loss: Literal["huber_mix", "huber_norm"] = "huber_mix"
    max_step: float = 0.1
    conv_width: int = 4

    @property
    def spec(self) -> MemorySpec:
        shared = {"chunk_size": self.chunk_size, "activation": "gelu", "layer_norm": True, "residual": True, "rule": "descent"}
        if self.member == "moneta":
            read = "chunk" if self.link == "mirror" else "token"
            return MemorySpec(**shared, loss="lp", power=self.power, link=self.link, link_power=self.link_power, read=read)
        if self.member == "yaad":
            return MemorySpec(**shared, loss=self.loss)
        return MemorySpec(**shared, loss="l2", loss_scale=2.0, link="softmax", read="chunk")

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        k, f = self.head_dim, self.hidden_mult * self.head_dim
        return ((k, f), (f, k))

    def problems(self) -> Iterator[Problem]:
        yield from not_positive(self, "num_heads", "head_dim", "hidden_mult", "chunk_size", "conv_width")
        if self.max_step <= 0:
            yield Problem("max_step", self.max_step, "must be positive")
        if self.power < 1:
            yield Problem("power", self.power, "must be at least 1")
        if self.link_power <= 1 or (self.link == "pnorm" and self.link_power == 3):
            yield Problem("link_power", self.link_power, "must be above 1, and not 3 with link='pnorm'", "the paper has 4")

    def build(self, info: BuildInfo) -> "MirasMixer":
        return MirasMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        width, scalars = self.num_heads * self.head_dim, (3 if self.member == "yaad" else 2) * self.num_heads
        projections = 2 * d_model * (5 * width + scalars) + 6 * self.conv_width * width
        return projections + self.num_heads * memory_flops(self.shapes, spec=self.spec, seq_len=seq_len)

    def state_size(self, d_model: int, seq_len: int) -> int:
        memory = memory_values(self.shapes, spec=self.spec, heads=self.num_heads)
        return memory + 3 * (self.conv_width - 1) * self.num_heads * self.head_dim

    @classmethod
    def example(cls) -> tuple["Miras", BuildInfo]:
        config = cls(member="yaad", num_heads=2, head_dim=8, hidden_mult=2, chunk_size=8)
        return config, BuildInfo(d_model=16, num_sub_layers=4, vocab_size=64)


class MirasMixer(RecurrentMixer):
    def __init__(self, config: Miras, info: BuildInfo):
        self.config = config
        h, k = config.num_heads, config.head_dim
        stream, heads, scalars = (("embed", info.d_model),), (("heads", h), ("head_dim", k)), (("heads", h),)
        self.query, self.key, self.value = Linear(stream, heads), Linear(stream, heads), Linear(stream, heads)
        self.query_conv = CausalConv(heads, width=config.conv_width)
        self.key_conv = CausalConv(heads, width=config.conv_width)
        self.value_conv = CausalConv(heads, width=config.conv_width)
        self.step_size, self.forget = Linear(stream, scalars), Linear(stream, scalars)
        self.forget_bias = param((h,), ("heads",), constant(logit(0.01)), group="vector")
        yaad = config.member == "yaad"
        self.threshold = Linear(stream, scalars) if yaad else None
        self.threshold_bias = param((h,), ("heads",), constant(inverse_softplus(1.0)), group="vector") if yaad else None
        # No paper says. Small weights would leave the layer norm next to nothing to divide by; Memora's are logits.
        inits = (normal(1.0),) * 2 if config.member == "memora" else tuple(fan_in(a) for a, _ in config.shapes)
        self.memory = FastWeights(config.spec, h, config.shapes, inits, backend=config.kernel)
        self.gate = Linear(stream, heads)
        self.norm = RMSNorm(k)
        self.output = Linear(heads, stream, init=fan_in(h * k, scale=info.residual_scale))

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> dict[str, Any]:
        convs = {"query": self.query_conv, "key": self.key_conv, "value": self.value_conv}
        return empty_state(batch, dtype, convs, memory=self.memory.init_state(batch))

    def mix(self, x_BTD: jax.Array, row: Row) -> jax.Array:
        config = self.config
        q = l2_normalize(row.conv("query", self.query_conv, self.query(x_BTD)))
        k = l2_normalize(row.conv("key", self.key_conv, self.key(x_BTD)))
        v = row.conv("value", self.value_conv, self.value(x_BTD))
        q, k, v = (save_point(x, "recurrence_in") for x in (q, k, v))
        step_BTH = config.max_step / config.head_dim * jax.nn.sigmoid(self.step_size(x_BTD).astype(jnp.float32))
        step_BTHL = jnp.broadcast_to(step_BTH[..., None], (*step_BTH.shape, 2))
        gates: dict[str, Any] = {"log_decay": log_forget(self.forget(x_BTD), self.forget_bias[...])}
        if self.threshold is not None and self.threshold_bias is not None:
            gates["threshold"] = jax.nn.softplus(self.threshold(x_BTD).astype(jnp.float32) + self.threshold_bias[...])
        o_BTHV = save_point(self.memory.recall(row, q, k, v, step=step_BTHL, **gates), "recurrence_out")
        return self.output(self.norm(o_BTHV) * jax.nn.silu(self.gate(x_BTD)))
