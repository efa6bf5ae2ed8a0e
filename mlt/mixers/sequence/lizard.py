"""Lizard (arXiv 2507.09025): gated linear attention over the whole past beside softmax over a short window with sinks."""

from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mlt.config.problems import Problem
from mlt.mixers import cache
from mlt.mixers.base import BuildInfo, SequenceMixerConfig, save_point, shared_axis
from mlt.mixers.feature_map import Hedgehog
from mlt.mixers.recurrent import RecurrentMixer, Row, empty_normalized, empty_state
from mlt.mixers.sizes import not_divisor, not_positive, recurrence_flops
from mlt.nn.linear import Linear
from mlt.nn.param import fan_in, ones, param, zeros


class Lizard(SequenceMixerConfig):
    """y = gla + alpha * anchor, with one gate G_t = sigmoid(x W_g) a token, shared by the heads:

        gla_t       sum over s <= t of w_ts v_s / sum of w_ts,  w_ts = G_{s+1} ... G_t f_q(q_t) . f_k(k_s)
        anchor_t    sum over the window of e^{q_t . k_s / sqrt(H)} v_s / (sum of the same exponentials + sum of e^{sink})

    f is the Hedgehog map [exp(x W), exp(-x W)], one W a head for queries and one for keys, from the identity. There
    are no rotary positions. The printed formula adds the sink logits themselves to the denominator, which must be
    positive: their exponentials are meant. alpha is a learned number a layer, from 1; sinks start at 0; the gate's
    projection has no bias. A wide window starves the recurrence of gradient (the paper's window 256 with 4 sinks).

    Attributes:
        num_heads: query heads (N).
        head_dim: width of a head (H).
        num_kv_heads: key and value heads (K), a divisor of num_heads; None means num_heads.
        window: tokens that the softmax part sees, the query's included.
        num_sinks: learned sink logits of each head, the meta memory.
        kernel: backend of the linear recurrence.
    """

    context: ClassVar[str] = "carry"
    op: ClassVar[str] = "linear_recurrence"

    num_heads: int
    head_dim: int
    num_kv_heads: int | None = None
    window: int = 128
    num_sinks: int = 4

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    def problems(self) -> Iterator[Problem]:
        sizes = list(not_positive(self, "num_heads", "head_dim", "num_kv_heads", "window", "num_sinks"))
        yield from sizes or not_divisor(self, "num_kv_heads", "num_heads")

    def build(self, info: BuildInfo) -> "LizardMixer":
        return LizardMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        n, h = self.num_heads, self.head_dim
        window = min(self.window, seq_len)
        seen = window - window * (window - 1) / (2 * seq_len)
        projections = 2 * d_model * (2 * n * h + 2 * self.kv_heads * h + 1)
        return projections + 4 * n * h * h + recurrence_flops(n, 2 * h, h, seq_len) + 4 * n * h * seen

    def state_size(self, d_model: int, seq_len: int) -> int:
        features = 2 * self.head_dim
        memory = self.num_heads * (features * self.head_dim + features + 1)
        return memory + 2 * cache.slots(seq_len, self.window) * self.kv_heads * self.head_dim

    @classmethod
    def example(cls) -> tuple["Lizard", BuildInfo]:
        config = cls(num_heads=2, num_kv_heads=1, head_dim=8, window=24)
        return config, BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class LizardMixer(RecurrentMixer):
    def __init__(self, config: Lizard, info: BuildInfo):
        self.config = config
        d, n, k, h = info.d_model, config.num_heads, config.kv_heads, config.head_dim
        stream, queries, keys = (("embed", d),), (("heads", n), ("head_dim", h)), ((shared_axis(k), k), ("head_dim", h))
        self.query = Linear(stream, queries)
        self.key = Linear(stream, keys)
        self.value = Linear(stream, keys)
        self.decay = Linear(stream, ((None, 1),))
        self.query_map = Hedgehog(n, h)
        self.key_map = Hedgehog(n, h)
        self.sinks = param((n, config.num_sinks), ("heads", None), zeros, group="vector")
        self.alpha = param((1,), (None,), ones)
        self.output = Linear(queries, stream, init=fan_in(n * h, scale=info.residual_scale))

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> Any:
        config = self.config
        memory = empty_normalized(batch, config.num_heads, 2 * config.head_dim, config.head_dim)
        keys = (config.kv_heads, config.head_dim)
        recent = cache.empty_cache(batch, cache.slots(max_length, config.window), dtype, key=keys, value=keys)
        return empty_state(batch, dtype, memory=memory, recent=recent)

    def mix(self, x_BTD: jax.Array, row: Row) -> jax.Array:
        config = self.config
        q_BTNH, k_BTKH, v_BTKH = (save_point(f(x_BTD), "attention_qkv") for f in (self.query, self.key, self.value))
        anchor_BTNH = row.attention(
            q_BTNH, k_BTKH, v_BTKH, window=config.window, sinks=jax.nn.logsumexp(self.sinks[...], axis=-1)
        )
        group = config.num_heads // config.kv_heads
        k_BTNH, v_BTNH = (jnp.repeat(x, group, axis=2) for x in (k_BTKH, v_BTKH))
        # A factor on a query's features cancels in the quotient; that of a key's is its input gate.
        (q_BTNF, _), (k_BTNF, log_input_BTN) = self.query_map(q_BTNH), self.key_map(k_BTNH)
        log_decay_BT1 = jax.nn.log_sigmoid(self.decay(x_BTD).astype(jnp.float32))
        gla_BTNH = row.linear_recurrence(
            q_BTNF,
            k_BTNF,
            v_BTNH,
            log_decay=jnp.broadcast_to(log_decay_BT1, log_input_BTN.shape),
            log_input=log_input_BTN,
            normalizer="sum",
            scale=1.0,
            implementation=config.kernel,
        )
        gla_BTNH, anchor_BTNH = save_point(gla_BTNH, "recurrence_out"), save_point(anchor_BTNH, "attention_out")
        return self.output((gla_BTNH + self.alpha[...] * anchor_BTNH).astype(gla_BTNH.dtype))
