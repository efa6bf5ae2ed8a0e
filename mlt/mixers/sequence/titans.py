"""Titans' neural long-term memory (LMM, arXiv 2501.00663): a small MLP trained token by token, with momentum and forgetting."""

import itertools
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from mlt_kernels.test_time_memory import MemorySpec

from mlt.config.problems import Problem
from mlt.mixers.base import BuildInfo, SequenceMixerConfig, save_point
from mlt.mixers.conv import CausalConv
from mlt.mixers.recurrent import RecurrentMixer, Row, empty_state
from mlt.mixers.sizes import not_positive
from mlt.mixers.test_time import FastWeights, log_forget, logit, memory_flops, memory_values
from mlt.nn.linear import Linear
from mlt.nn.norm import RMSNorm, l2_normalize
from mlt.nn.param import constant, fan_in, normal, param, zeros


class Titans(SequenceMixerConfig):
    """S_t = m_t S_{t-1} - theta_t dl/dM, M_t = (1 - alpha_t) M_{t-1} + S_t, o_t = M_t(q_t), l = |M(k_t) - v_t|^2.

    Gradients are taken at the memory that enters each chunk of a document. q, k and v go through a short convolution and
    SiLU, q and k are L2-normalized. theta = max_step sigmoid(x W) / head_dim, m = sigmoid(x W + b),
    alpha = sigmoid(x W + b) with b starting at logit(0.01). The answer is normed and gated by SiLU of the input.

    Attributes:
        num_heads: memories side by side (H).
        head_dim: width of a query, key and value.
        depth: matrices of the memory; 1 is a linear memory.
        hidden_mult: hidden widths are this times head_dim.
        chunk_size: tokens between two points where gradients are taken. Part of the model.
        max_step: largest step times head_dim; None means 1 for depth 1 and 0.1 beyond.
        layer_norm: the memory is x + LayerNorm(MLP(x)), which is steadier when deep.
        conv_width: taps of the short convolutions.
    """

    context: ClassVar[str] = "none"
    op: ClassVar[str] = "test_time_memory"

    num_heads: int
    head_dim: int
    depth: int = 2
    hidden_mult: int = 4
    chunk_size: int = 64
    max_step: float | None = None
    layer_norm: bool = False
    conv_width: int = 4

    @property
    def spec(self) -> MemorySpec:
        return MemorySpec(
            chunk_size=self.chunk_size,
            net="linear" if self.depth == 1 else "mlp",
            activation="silu",
            layer_norm=self.layer_norm,
            residual=self.layer_norm,
            loss="l2",
            loss_scale=2.0,
            rule="momentum",
        )

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        sides = [self.head_dim, *[self.hidden_mult * self.head_dim] * (self.depth - 1), self.head_dim]
        return tuple(itertools.pairwise(sides))

    def problems(self) -> Iterator[Problem]:
        yield from not_positive(self, "num_heads", "head_dim", "depth", "hidden_mult", "chunk_size", "conv_width")
        if self.max_step is not None and self.max_step <= 0:
            yield Problem("max_step", self.max_step, "must be positive", "None takes the default for the depth")

    def build(self, info: BuildInfo) -> "TitansMixer":
        return TitansMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        width = self.num_heads * self.head_dim
        projections = 2 * d_model * (5 * width + 3 * self.num_heads) + 6 * self.conv_width * width
        return projections + self.num_heads * memory_flops(self.shapes, spec=self.spec, seq_len=seq_len)

    def state_size(self, d_model: int, seq_len: int) -> int:
        memory = memory_values(self.shapes, spec=self.spec, heads=self.num_heads)
        return memory + 3 * (self.conv_width - 1) * self.num_heads * self.head_dim

    @classmethod
    def example(cls) -> tuple["Titans", BuildInfo]:
        config = cls(num_heads=2, head_dim=8, hidden_mult=2, chunk_size=8)
        return config, BuildInfo(d_model=16, num_sub_layers=4, vocab_size=64)


class TitansMixer(RecurrentMixer):
    def __init__(self, config: Titans, info: BuildInfo):
        self.config = config
        h, k = config.num_heads, config.head_dim
        stream, heads, scalars = (("embed", info.d_model),), (("heads", h), ("head_dim", k)), (("heads", h),)
        self.query, self.key, self.value = Linear(stream, heads), Linear(stream, heads), Linear(stream, heads)
        self.query_conv = CausalConv(heads, width=config.conv_width)
        self.key_conv = CausalConv(heads, width=config.conv_width)
        self.value_conv = CausalConv(heads, width=config.conv_width)
        self.step_size, self.forget, self.momentum = Linear(stream, scalars), Linear(stream, scalars), Linear(stream, scalars)
        self.forget_bias = param((h,), ("heads",), constant(logit(0.01)), group="vector")
        self.momentum_bias = param((h,), ("heads",), zeros, group="vector")
        inits = (normal(0.02),) * config.depth
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
        largest = config.max_step or (1.0 if config.depth == 1 else 0.1)
        step_BTH = largest / config.head_dim * jax.nn.sigmoid(self.step_size(x_BTD).astype(jnp.float32))
        step_BTHL = jnp.broadcast_to(step_BTH[..., None], (*step_BTH.shape, config.depth))
        gates: dict[str, Any] = {"log_decay": log_forget(self.forget(x_BTD), self.forget_bias[...])}
        pre_momentum_BTH = self.momentum(x_BTD).astype(jnp.float32) + self.momentum_bias[...]
        gates["log_momentum"] = jax.nn.log_sigmoid(pre_momentum_BTH)
        o_BTHV = save_point(self.memory.recall(row, q, k, v, step=step_BTHL, **gates), "recurrence_out")
        return self.output(self.norm(o_BTHV) * jax.nn.silu(self.gate(x_BTD)))
