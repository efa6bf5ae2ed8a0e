"""RAT (arXiv 2507.04416): a gated recurrence inside short chunks, softmax attention over the chunks' last states."""

from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from mlt_kernels.attention import merge

from mlt.config.problems import Problem
from mlt.mixers import cache
from mlt.mixers.base import BuildInfo, SequenceMixerConfig, save_point
from mlt.mixers.recurrent import RecurrentMixer, Row, empty_state
from mlt.mixers.sizes import not_divisor, not_positive, rope_problems
from mlt.nn.linear import Linear
from mlt.nn.param import fan_in, log_of_uniform, param
from mlt.nn.rope import apply_rope


class RAT(SequenceMixerConfig):
    """Keys and values are running means inside chunks of `chunk` tokens, and a query sees one of each chunk before its own:

        v~_t = g_t v~_{t-1} + (1 - g_t) v_t, k~_t likewise, from zero at every chunk;  g_t = sigmoid(x W_g + b)
        y_t  = softmax over { last (k~, v~) of each earlier chunk } and { (k~_t, v~_t) };  out = W_o (sigmoid(x W_z) * y_t)

    g is a number a channel, for the key and the value of a channel alike. Queries and keys are projected into
    `num_groups` heads; head n takes group n mod num_groups. Rotary positions on q and k~ count chunks. b starts at
    log U(1, chunk - 1). Chunks start over with every document. chunk = 1 is gated attention, a chunk as long as the
    document a gated recurrence.

    Attributes:
        num_heads: heads (N).
        head_dim: width of a head (H).
        num_groups: projections of queries and keys that the heads share, a divisor of num_heads.
        chunk: tokens of a chunk.
        rope_base: base of the rotary embedding; None leaves positions out.
        kernel: backend of the attention.
    """

    context: ClassVar[str] = "carry"
    op: ClassVar[str] = "attention"

    num_heads: int
    head_dim: int
    num_groups: int = 2
    chunk: int = 16
    rope_base: float | None = 10_000.0

    def problems(self) -> Iterator[Problem]:
        sizes = list(not_positive(self, "num_heads", "head_dim", "num_groups", "chunk"))
        yield from sizes or not_divisor(self, "num_groups", "num_heads")
        yield from rope_problems(self)

    def build(self, info: BuildInfo) -> "RATMixer":
        return RATMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        width = self.num_heads * self.head_dim
        projections = 2 * d_model * (4 * width + 2 * self.num_groups * self.head_dim)
        return projections + 8 * width + 4 * width * (seq_len / (2 * self.chunk) + 1)

    def state_size(self, d_model: int, seq_len: int) -> int:
        return 2 * self.num_heads * self.head_dim * (1 + max(seq_len // self.chunk, 1))

    @classmethod
    def example(cls) -> tuple["RAT", BuildInfo]:
        return cls(num_heads=4, head_dim=8, chunk=4), BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class RATMixer(RecurrentMixer):
    def __init__(self, config: RAT, info: BuildInfo):
        self.config = config
        d, n, h = info.d_model, config.num_heads, config.head_dim
        stream, heads, groups = (("embed", d),), (("heads", n), ("head_dim", h)), ((None, config.num_groups), ("head_dim", h))
        self.query = Linear(stream, groups)
        self.key = Linear(stream, groups)
        self.value = Linear(stream, heads)
        self.forget = Linear(stream, heads)
        self.forget_bias = param((n, h), ("heads", "head_dim"), log_of_uniform(1.0, max(config.chunk - 1.0, 1.0)), group="vector")
        self.gate = Linear(stream, heads)
        self.output = Linear(heads, stream, init=fan_in(n * h, scale=info.residual_scale))

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> Any:
        heads = (self.config.num_heads, self.config.head_dim)
        ends = cache.empty_picked(batch, max_length // self.config.chunk, dtype, key=heads, value=heads)
        return empty_state(batch, dtype, memory=(heads[0], 2 * heads[1]), ends=ends)

    def mix(self, x_BTD: jax.Array, row: Row) -> jax.Array:
        config = self.config
        tiled = lambda x_BTGH: jnp.tile(x_BTGH, (1, 1, config.num_heads // config.num_groups, 1))  # noqa: E731
        q_BTNH, k_BTNH, v_BTNH = tiled(self.query(x_BTD)), tiled(self.key(x_BTD)), self.value(x_BTD)
        k_BTNH, v_BTNH = self._running_means(k_BTNH, v_BTNH, x_BTD, row)
        chunk_BT, place_BT = row.ctx.positions // config.chunk, row.ctx.positions % config.chunk
        if config.rope_base is not None:
            q_BTNH, k_BTNH = (apply_rope(x, chunk_BT, base=config.rope_base) for x in (q_BTNH, k_BTNH))
        q_BTNH, k_BTNH, v_BTNH = (save_point(x, "attention_qkv") for x in (q_BTNH, k_BTNH, v_BTNH))
        earlier = row.attention_to_picked(
            q_BTNH,
            k_BTNH,
            v_BTNH,
            picked_BT=place_BT == config.chunk - 1,
            spacing=config.chunk,
            # A query sees the chunks before its own.
            positions=(chunk_BT - 1, chunk_BT),
            name="ends",
            implementation=config.kernel,
        )
        own_BTN = jnp.sum(q_BTNH.astype(jnp.float32) * k_BTNH.astype(jnp.float32), axis=-1) * config.head_dim**-0.5
        o_BTNH, _ = merge([earlier, (v_BTNH, own_BTN)])
        return self.output(jax.nn.sigmoid(self.gate(x_BTD)) * save_point(o_BTNH, "attention_out"))

    def _running_means(self, k_BTNH, v_BTNH, x_BTD, row):
        forget_BTNH = jax.nn.sigmoid(self.forget(x_BTD).astype(jnp.float32) + self.forget_bias[...])
        write_BTNH = 1.0 - forget_BTNH
        fresh_BT = row.ctx.positions % self.config.chunk == 0
        keep_BTNH = jnp.where(fresh_BT[..., None, None], 0.0, forget_BTNH)
        pair = lambda k, v: save_point(jnp.concatenate([k, v], axis=-1), "recurrence_in")  # noqa: E731
        both = row.diagonal_recurrence(pair(keep_BTNH, keep_BTNH), pair(write_BTNH * k_BTNH, write_BTNH * v_BTNH))
        return jnp.split(save_point(both, "recurrence_out").astype(x_BTD.dtype), 2, axis=-1)
