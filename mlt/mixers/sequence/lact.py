"""LaCT (arXiv 2505.23884): one large update of a gated memory per chunk, beside attention in a sliding window."""

from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from mlt_kernels.test_time_memory import LM_NEWTON_SCHULZ, MemorySpec

from mlt.config.problems import Problem
from mlt.mixers import cache
from mlt.mixers.base import BuildInfo, SequenceMixerConfig, save_point
from mlt.mixers.recurrent import RecurrentMixer, Row, empty_state
from mlt.mixers.sizes import not_divisor, not_positive
from mlt.mixers.test_time import FastWeights, inverse_softplus, memory_flops, memory_values
from mlt.nn.linear import Linear
from mlt.nn.norm import RMSNorm
from mlt.nn.param import constant, fan_in, normal, ones, param, zeros
from mlt.nn.rope import apply_rope


class LaCT(SequenceMixerConfig):
    """f(x) = (silu(x W_0) * (x W_2)) W_1 learns -f(k) . v; after each chunk of a document

        S <- sum_j lr_j (ascent directions) + mean(m) S,   W <- rows(W + newton_schulz(S)) at the norms of the initial memory

    and every token reads the W its chunk began with. Windowed attention covers what the memory has not seen; both share q, k,
    v, and their answers are summed before the output projection. The memory's q and k have a learned scale and offset, SiLU, L2
    norm over the memory's head, then the attention's rotation; its v has SiLU. lr = softplus(x W + softplus^-1(0.001)), one
    for each matrix. The memory's answer is normed per head and gated by SiLU(x W), one gate a head.

    Attributes:
        num_heads: heads of the attention.
        head_dim: their width, even.
        num_memory_heads: memories side by side; divides num_heads.
        hidden_mult: hidden width of a memory over its head's width.
        chunk_size: tokens of one update. Part of the model.
        window: of the attention, itself included; the paper has chunk_size, and less leaves tokens that nothing remembers.
        momentum: m = sigmoid(x W) of the steps.
        muon: orthogonalize the steps.
        rank: W_0 and W_2 start, and stay, at a learned product of this rank plus half the identity; None learns them whole.
        rope_base: rotary base.
    """

    context: ClassVar[str] = "none"
    op: ClassVar[str] = "test_time_memory"

    num_heads: int
    head_dim: int
    num_memory_heads: int = 4
    hidden_mult: int = 1
    chunk_size: int = 2048
    window: int = 2048
    momentum: bool = True
    muon: bool = True
    rank: int | None = 32
    rope_base: float = 1e6

    @property
    def spec(self) -> MemorySpec:
        return MemorySpec(
            chunk_size=self.chunk_size,
            net="gated",
            activation="silu",
            loss="dot",
            rule="chunk",
            read="chunk",
            newton_schulz=LM_NEWTON_SCHULZ if self.muon else (),
            row_norm=True,
        )

    @property
    def memory_dim(self) -> int:
        return self.num_heads * self.head_dim // self.num_memory_heads

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        k, f = self.memory_dim, self.hidden_mult * self.memory_dim
        return ((k, f), (k, f), (f, k))

    def problems(self) -> Iterator[Problem]:
        names = ("num_heads", "head_dim", "num_memory_heads", "hidden_mult", "chunk_size", "window", "rank")
        sizes = list(not_positive(self, *names))
        yield from sizes or not_divisor(self, "num_memory_heads", "num_heads")
        if self.head_dim % 2:
            yield Problem("head_dim", self.head_dim, "must be even under rotary positions")
        if self.rope_base <= 0:
            yield Problem("rope_base", self.rope_base, "must be positive")
        if self.window < self.chunk_size:
            yield Problem("window", self.window, f"must be at least chunk_size = {self.chunk_size}, or tokens go unseen")

    def build(self, info: BuildInfo) -> "LaCTMixer":
        return LaCTMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        width, heads = self.num_heads * self.head_dim, self.num_memory_heads
        projections = 2 * d_model * (4 * width + heads * (4 + self.momentum))
        seen = min(self.window, seq_len)
        seen -= seen * (seen - 1) / (2 * seq_len)
        return projections + 4 * width * seen + heads * memory_flops(self.shapes, spec=self.spec, seq_len=seq_len)

    def state_size(self, d_model: int, seq_len: int) -> int:
        memory = memory_values(self.shapes, spec=self.spec, heads=self.num_memory_heads, momentum=self.momentum)
        return memory + 2 * cache.slots(seq_len, self.window) * self.num_heads * self.head_dim

    @classmethod
    def example(cls) -> tuple["LaCT", BuildInfo]:
        config = cls(num_heads=4, head_dim=4, num_memory_heads=2, chunk_size=8, window=8, rank=2)
        return config, BuildInfo(d_model=16, num_sub_layers=4, vocab_size=64)


class LaCTMixer(RecurrentMixer):
    def __init__(self, config: LaCT, info: BuildInfo):
        self.config = config
        h, m, k = config.num_heads, config.num_memory_heads, config.memory_dim
        f = config.hidden_mult * k
        stream, heads, memories = (("embed", info.d_model),), (("heads", h), ("head_dim", config.head_dim)), (("heads", m),)
        self.query, self.key, self.value = Linear(stream, heads), Linear(stream, heads), Linear(stream, heads)
        channels = ((h, config.head_dim), ("heads", "head_dim"))
        self.query_scale, self.query_offset = param(*channels, ones, group="vector"), param(*channels, zeros, group="vector")
        self.key_scale, self.key_offset = param(*channels, ones, group="vector"), param(*channels, zeros, group="vector")
        self.rate = Linear(stream, (*memories, (None, 3)), init=normal(0.02))
        self.rate_bias = param((m, 3), ("heads", None), constant(inverse_softplus(1e-3)), group="vector")
        self.momentum = Linear(stream, memories, init=normal(0.02)) if config.momentum else None
        low = config.rank is not None
        inits = None if low else (fan_in(k), fan_in(k), fan_in(f))
        self.memory = FastWeights(config.spec, m, config.shapes, inits, momentum=config.momentum, backend=config.kernel)
        if config.rank is not None:
            left, right = ((m, k, config.rank), ("heads", "head_dim", None)), ((m, config.rank, f), ("heads", None, None))
            # In x W the paper's left factor of a (hidden, input) matrix is the right one.
            narrow, wide = normal(0.5 * k**-0.5), normal(0.5 * config.rank**-0.5)
            self.input_left, self.input_right = param(*left, narrow), param(*right, wide)
            self.scale_left, self.scale_right = param(*left, narrow), param(*right, wide)
            self.output_memory = param((m, f, k), ("heads", None, "head_dim"), fan_in(f))
        self.norm = RMSNorm(k)
        self.gate = Linear(stream, memories)
        self.output = Linear(heads, stream, init=fan_in(h * config.head_dim, scale=info.residual_scale))

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> dict[str, Any]:
        config = self.config
        shape = (config.num_heads, config.head_dim)
        recent = cache.empty_cache(batch, cache.slots(max_length, config.window), dtype, key=shape, value=shape)
        return empty_state(batch, dtype, memory=self.memory.init_state(batch), recent=recent)

    def mix(self, x_BTD: jax.Array, row: Row) -> jax.Array:
        config = self.config
        q_BTNH, k_BTNH, v_BTNH = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        positions = row.ctx.positions
        queries = apply_rope(q_BTNH, positions, base=config.rope_base)
        keys = apply_rope(k_BTNH, positions, base=config.rope_base)
        attended = row.attention(queries, keys, v_BTNH, window=config.window)
        q = self._memory_input(q_BTNH, self.query_scale[...], self.query_offset[...], positions)
        k = self._memory_input(k_BTNH, self.key_scale[...], self.key_offset[...], positions)
        v = self._by_memory(jax.nn.silu(v_BTNH))
        q, k, v = (save_point(x, "recurrence_in") for x in (q, k, v))
        rate_BTM3 = jax.nn.softplus(self.rate(x_BTD).astype(jnp.float32) + self.rate_bias[...])
        gates = {}
        if self.momentum is not None:
            gates["log_momentum"] = jax.nn.log_sigmoid(self.momentum(x_BTD).astype(jnp.float32))
        answer = self.memory.recall(row, q, k, v, step=rate_BTM3, matrices=self._matrices(), **gates)
        answer = save_point(answer, "recurrence_out")
        answer = self.norm(answer) * jax.nn.silu(self.gate(x_BTD))[..., None]
        return self.output(attended + answer.reshape(attended.shape))

    def _matrices(self) -> tuple[jax.Array, ...]:
        if self.config.rank is None:
            return self.memory.matrices()
        half = 0.5 * jnp.eye(*self.config.shapes[0])
        first = jnp.matmul(self.input_left[...], self.input_right[...], precision="highest") + half
        second = jnp.matmul(self.scale_left[...], self.scale_right[...], precision="highest") + half
        return first, second, self.output_memory[...]

    def _memory_input(self, x_BTNH: jax.Array, scale: jax.Array, offset: jax.Array, positions: jax.Array) -> jax.Array:
        x = self._by_memory(jax.nn.silu(x_BTNH.astype(jnp.float32) * scale + offset))
        square = jnp.sum(x * x, axis=-1, keepdims=True)
        x = x / (jnp.sqrt(jnp.where(square > 0, square, 1.0)) + 1e-5)
        rotated = apply_rope(x.reshape(x_BTNH.shape), positions, base=self.config.rope_base)
        return self._by_memory(rotated).astype(x_BTNH.dtype)

    def _by_memory(self, x_BTNH: jax.Array) -> jax.Array:
        return x_BTNH.reshape(*x_BTNH.shape[:2], self.config.num_memory_heads, -1)
