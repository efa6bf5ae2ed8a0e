"""TTT-Linear and TTT-MLP (arXiv 2407.04620): the state is a small model trained on key -> value - key by mini-batches."""

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
from mlt.mixers.test_time import FastWeights, memory_flops, memory_values
from mlt.nn.linear import Linear
from mlt.nn.param import fan_in, normal, ones, param, zeros
from mlt.nn.rope import apply_rope


class TTT(SequenceMixerConfig):
    """W_i = W_0 - tau_i sum_{j<=i} eta_j dl_j/dW at W_0 inside a mini-batch of C; o_i = q_i + LN(f(q_i; W_i)).

    f is x W + b, or gelu(x W_1 + b_1) W_2 + b_2; l = |k + LN(f(k)) - v|^2 / 2 with the head's own outer scale and bias;
    tau_i = max(1/i + learned offset_i, 0); eta = base_lr / head_dim sigmoid(x w + b).

    Attributes:
        num_heads: memories side by side (H).
        head_dim: width of a query, key and value.
        memory: "linear" or "mlp".
        hidden_mult: hidden width of the MLP over head_dim.
        chunk_size: the mini-batch C. Part of the model.
        backbone: "mamba": q and k share a projection and have a causal convolution each, the result is gated by
            gelu(x W_g); "transformer": three projections, no convolution, no gate.
        base_lr: None means 1 for a linear memory and 0.1 for an MLP. The papers warm the latter up with the outer rate.
        rope_base: rotary base; positions restart with each mini-batch. None leaves them out.
        conv_width: taps of the convolutions.
    """

    context: ClassVar[str] = "none"
    op: ClassVar[str] = "test_time_memory"

    num_heads: int
    head_dim: int
    memory: Literal["linear", "mlp"] = "linear"
    hidden_mult: int = 4
    chunk_size: int = 16
    backbone: Literal["mamba", "transformer"] = "mamba"
    base_lr: float | None = None
    rope_base: float | None = 10_000.0
    conv_width: int = 4

    @property
    def spec(self) -> MemorySpec:
        return MemorySpec(
            chunk_size=self.chunk_size,
            net=self.memory,
            activation="gelu",
            bias=True,
            layer_norm=True,
            residual=True,
            loss="l2",
            rule="mean",
        )

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        k, f = self.head_dim, self.hidden_mult * self.head_dim
        return ((k, k),) if self.memory == "linear" else ((k, f), (f, k))

    def problems(self) -> Iterator[Problem]:
        yield from not_positive(self, "num_heads", "head_dim", "hidden_mult", "chunk_size", "conv_width")
        for name in ("base_lr", "rope_base"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                yield Problem(name, value, "must be positive")
        if self.rope_base is not None and self.head_dim % 2:
            yield Problem("head_dim", self.head_dim, "must be even under rotary positions", "use an even width or rope_base=None")

    def build(self, info: BuildInfo) -> "TTTMixer":
        return TTTMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        width, mamba = self.num_heads * self.head_dim, self.backbone == "mamba"
        projections = 2 * d_model * (4 * width + self.num_heads) + (4 * self.conv_width * width if mamba else 0)
        return projections + self.num_heads * memory_flops(self.shapes, spec=self.spec, seq_len=seq_len)

    def state_size(self, d_model: int, seq_len: int) -> int:
        convolutions = 2 * (self.conv_width - 1) * self.num_heads * self.head_dim
        memory = memory_values(self.shapes, spec=self.spec, heads=self.num_heads)
        return memory + (convolutions if self.backbone == "mamba" else 0)

    @classmethod
    def example(cls) -> tuple["TTT", BuildInfo]:
        config = cls(num_heads=2, head_dim=8, memory="mlp", hidden_mult=2, chunk_size=8, base_lr=0.5)
        return config, BuildInfo(d_model=16, num_sub_layers=4, vocab_size=64)


class TTTMixer(RecurrentMixer):
    def __init__(self, config: TTT, info: BuildInfo):
        self.config = config
        mamba = config.backbone == "mamba"
        h, k = config.num_heads, config.head_dim
        stream, heads = (("embed", info.d_model),), (("heads", h), ("head_dim", k))
        self.query, self.value = Linear(stream, heads), Linear(stream, heads)
        self.key = None if mamba else Linear(stream, heads)
        if mamba:
            self.query_conv = CausalConv(heads, width=config.conv_width, activation=None)
            self.key_conv = CausalConv(heads, width=config.conv_width, activation=None)
        self.gate = Linear(stream, heads) if mamba else None
        self.step_size = Linear(stream, (("heads", h),), init=normal(0.02), bias=True)
        self.row_offset = param((config.chunk_size,), (None,), zeros, group="vector")
        inits = (normal(0.02),) * len(config.shapes)
        self.memory = FastWeights(config.spec, h, config.shapes, inits, backend=config.kernel)
        self.norm_scale = param((h, k), ("heads", "head_dim"), ones, group="vector")
        self.norm_bias = param((h, k), ("heads", "head_dim"), zeros, group="vector")
        self.output = Linear(heads, stream, init=fan_in(h * k, scale=info.residual_scale))

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> dict[str, Any]:
        convs = {"query": self.query_conv, "key": self.key_conv} if self.config.backbone == "mamba" else {}
        return empty_state(batch, dtype, convs, memory=self.memory.init_state(batch))

    def mix(self, x_BTD: jax.Array, row: Row) -> jax.Array:
        config = self.config
        q, v = self.query(x_BTD), self.value(x_BTD)
        if self.key is None:
            q, k = row.conv("query", self.query_conv, q), row.conv("key", self.key_conv, q)
        else:
            k = self.key(x_BTD)
        if config.rope_base is not None:
            place_BT = row.ctx.positions % config.chunk_size
            q, k = (apply_rope(x, place_BT, base=config.rope_base) for x in (q, k))
        q, k, v = (save_point(x, "recurrence_in") for x in (q, k, v))
        base = config.base_lr or (1.0 if config.memory == "linear" else 0.1)
        step_BTH = base / config.head_dim * jax.nn.sigmoid(self.step_size(x_BTD).astype(jnp.float32))
        step_BTHL = jnp.broadcast_to(step_BTH[..., None], (*step_BTH.shape, len(config.shapes)))
        share_C = 1 / jnp.arange(1, config.chunk_size + 1, dtype=jnp.float32)
        row_weight = jnp.maximum(share_C + self.row_offset[...], 0.0)
        o_BTHV = save_point(self.memory.recall(row, q, k, v, step=step_BTHL, row_weight=row_weight), "recurrence_out")
        y_BTHV = self._normalize(o_BTHV)
        return self.output(y_BTHV if self.gate is None else y_BTHV * jax.nn.gelu(self.gate(x_BTD)))

    def _normalize(self, o_BTHV: jax.Array) -> jax.Array:
        """LayerNorm over all heads together."""
        o = o_BTHV.astype(jnp.float32)
        centred = o - jnp.mean(o, axis=(-2, -1), keepdims=True)
        variance = jnp.mean(centred * centred, axis=(-2, -1), keepdims=True)
        normed = centred * jax.lax.rsqrt(variance + 1e-6) * self.norm_scale[...] + self.norm_bias[...]
        return normed.astype(o_BTHV.dtype)
