"""LongVQ (arXiv 2404.11163): softmax attention to keys from a small codebook, which makes it a recurrence over codes."""

from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import mlt_kernels
from mlt_kernels.attention import EMPTY_LSE, merge

from mlt.config.problems import Problem
from mlt.mixers import cache
from mlt.mixers.base import Aux, BuildInfo, Context, SequenceMixerConfig, save_point
from mlt.mixers.blocks import last_tokens
from mlt.mixers.recurrent import Continuation, RecurrentMixer, Row, empty_state
from mlt.mixers.sizes import not_positive, recurrence_flops
from mlt.nn.linear import Linear
from mlt.nn.norm import rms_normalize
from mlt.nn.param import fan_in, normal, param, uniform
from mlt.parallel import sequence
from mlt.parallel.local import CHANNELS, Q_HEADS, TOKENS, local


class LongVQ(SequenceMixerConfig):
    """A fading average e of the stream gives queries and keys; keys are rounded to the nearest of `codes` vectors a head:

        e_t = a e_{t-1} + (1 - a) x_t,  a = sigmoid of a learned number a channel
        q = e W_q,  k = norm(e W_k),  c(k) the code nearest to k,  v = silu(x W_v)
        o_t = sum_{s <= t} exp(q_t . c(k_s) / sqrt(K)) v_s / sum_{s <= t} exp(q_t . c(k_s) / sqrt(K))
        y = W_o (silu(e W_g) * o)

    Keys that share a code share their score, so that the sums need one running sum of values and a count for each code:
    the cost is linear in T and the state is fixed. Tokens of the last `window` are added one by one, where the rounding is
    straight-through: gradients reach their keys as if they had not been rounded. Older ones are in the running sums.
    The codebook learns from |stop(k) - c|^2 and keys from `commitment` |k - stop(c)|^2, means over tokens and heads, times
    `codebook_loss`; both are per batch. The abstract and secondary notes name these parts and no equation, size or code is
    public: projections, gates, window and losses are our choice.

    Attributes:
        num_heads: heads (N).
        key_dim: width of a query or key (K).
        value_dim: width of a value (V); None means key_dim.
        codes: vectors of a head's codebook.
        window: tokens that are read one by one, the query's included.
        commitment: weight of the pull of keys to their codes, over that of codes to their keys.
        codebook_loss: weight of both in the training loss.
        kernel: backend of the window's attention.
    """

    context: ClassVar[str] = "carry"
    op: ClassVar[str] = "attention"

    num_heads: int
    key_dim: int
    value_dim: int | None = None
    codes: int = 256
    window: int = 64
    commitment: float = 0.25
    codebook_loss: float = 1.0

    @property
    def values(self) -> int:
        return self.value_dim or self.key_dim

    def problems(self) -> Iterator[Problem]:
        yield from not_positive(self, "num_heads", "key_dim", "value_dim", "codes", "window")
        if self.commitment < 0:
            yield Problem("commitment", self.commitment, "must not be negative")
        if self.codebook_loss <= 0:
            yield Problem("codebook_loss", self.codebook_loss, "must be positive: the codebook learns from nothing else")

    def build(self, info: BuildInfo) -> "LongVQMixer":
        return LongVQMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        n, k, v = self.num_heads, self.key_dim, self.values
        seen = min(self.window, seq_len)
        seen -= seen * (seen - 1) / (2 * seq_len)
        codes = 4 * n * self.codes * k + recurrence_flops(n, self.codes, v + 1, seq_len)
        return 2 * d_model * n * (2 * k + 3 * v) + 2 * d_model + codes + 2 * n * (k + v) * seen

    def state_size(self, d_model: int, seq_len: int) -> int:
        n, k, v = self.num_heads, self.key_dim, self.values
        return d_model + n * self.codes * (v + 1) + cache.slots(seq_len, self.window + 1) * n * (k + v)

    @classmethod
    def example(cls) -> tuple["LongVQ", BuildInfo]:
        config = cls(num_heads=2, key_dim=8, value_dim=12, codes=6, window=5)
        return config, BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class LongVQMixer(RecurrentMixer):
    def __init__(self, config: LongVQ, info: BuildInfo):
        self.config = config
        d, n, k, v = info.d_model, config.num_heads, config.key_dim, config.values
        stream, keys, values = (("embed", d),), (("heads", n), ("head_dim", k)), (("heads", n), ("head_dim", v))
        self.keep = param((d,), ("heads",), uniform(0.0, 4.0))
        self.query = Linear(stream, keys)
        self.key = Linear(stream, keys)
        self.value = Linear(stream, values)
        self.gate = Linear(stream, values)
        self.codebook = param((n, config.codes, k), ("heads", None, "head_dim"), normal(1.0), group="vector")
        self.output = Linear(values, stream, init=fan_in(n * v, scale=info.residual_scale))

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        y_BTD, _ = super().__call__(x_BTD, ctx)
        return y_BTD, {"loss/codebook": self._loss(x_BTD, ctx)}

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> Any:
        config = self.config
        n, count = config.num_heads, cache.slots(max_length, config.window + 1)
        recent = cache.empty_cache(batch, count, dtype, key=(n, config.key_dim), value=(n, config.values))
        return empty_state(batch, dtype, average=self.keep.shape, codes=(n, config.codes, config.values + 1), recent=recent)

    def mix(self, x_BTD: jax.Array, row: Row) -> jax.Array:
        average_BTD = self._average(x_BTD, row)
        q_BTNK, v_BTNV = self.query(average_BTD), jax.nn.silu(self.value(x_BTD))
        k_BTNK = self._key(average_BTD)
        code_BTN = self._nearest(k_BTNK)
        k_BTNK = self._rounded(k_BTNK, code_BTN)
        q_BTNK, k_BTNK, v_BTNV = (save_point(x, "attention_qkv") for x in (q_BTNK, k_BTNK, v_BTNV))
        near, (old_k, old_v, old_BT) = self._window(row, q_BTNK, k_BTNK, v_BTNV)
        far = self._codes(row, q_BTNK, self._nearest(old_k.astype(jnp.float32)), old_v, old_BT)
        o_BTNV, _ = merge([near, far])
        o_BTNV = save_point(o_BTNV.astype(x_BTD.dtype), "attention_out")
        return self.output(jax.nn.silu(self.gate(average_BTD)) * o_BTNV)

    def _average(self, x_BTD: jax.Array, row: Row) -> jax.Array:
        keep_D = jax.nn.sigmoid(self.keep[...])
        keep_BTD = jnp.broadcast_to(keep_D, x_BTD.shape)
        fresh_BTD = (1 - keep_D) * x_BTD.astype(jnp.float32)
        return row.diagonal_recurrence(keep_BTD, fresh_BTD, name="average").astype(x_BTD.dtype)

    def _key(self, average_BTD: jax.Array) -> jax.Array:
        return rms_normalize(self.key(average_BTD), eps=1e-6)

    def _nearest(self, k_BTNK: jax.Array) -> jax.Array:
        """(B, T, N): which code of its head each key, float32, is nearest to."""
        codes_NCK = jax.lax.stop_gradient(self.codebook[...])
        with jax.default_matmul_precision("highest"):
            score = jnp.einsum("btnk,nck->btnc", k_BTNK, codes_NCK) - 0.5 * jnp.sum(codes_NCK**2, axis=-1)
        return jnp.argmax(score, axis=-1)

    def _rounded(self, k_BTNK: jax.Array, code_BTN: jax.Array) -> jax.Array:
        """The code, float32, with the gradient of the key."""
        codes = jax.lax.stop_gradient(self.codebook[...])
        taken_BTNK = codes[jnp.arange(codes.shape[0]), code_BTN]
        return taken_BTNK + (k_BTNK - jax.lax.stop_gradient(k_BTNK))

    def _window(self, row: Row, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[Any, Any]:
        """Attention to the window (o, log-sum-exp); and key, value and presence of the token that leaves it at each token."""
        window, shards = self.config.window, row.ctx.rules.size("seq")
        k = k.astype(v.dtype)

        def run(q, longer, own):
            longer = jax.tree.map(lambda x: last_tokens(x, q.shape[1] + window), longer)
            k, v, segments, positions = longer
            pair: dict[str, Any] = {"segment_ids": (own[0], segments), "positions": (own[1], positions)}
            near = mlt_kernels.attention(q, k, v, window=window, return_lse=True, implementation=self.config.kernel, **pair)
            left = jax.tree.map(lambda x: x[:, : q.shape[1]], longer)
            return near, (left[0], left[1], (left[2] == own[0]) & (own[0] != 0))

        if isinstance(row, Continuation):
            seen, row.new["recent"] = cache.extend(row.state["recent"], row.ctx, window=window + 1, key=k, value=v)
            longer = tuple(seen[name] for name in ("key", "value", "segment", "position"))
            return run(q, longer, (row.ctx.segment_ids, row.ctx.positions))

        def whole(q, k, v, segments, positions):
            longer = (k, v, segments, positions)
            if shards > 1:
                longer = sequence.with_front(longer, window, shards)
            return run(q, longer, (segments, positions))

        inputs = (Q_HEADS, Q_HEADS, Q_HEADS, TOKENS, TOKENS)
        outputs = ((Q_HEADS, CHANNELS), (Q_HEADS, Q_HEADS, TOKENS))
        return local(whole, row.ctx.rules, inputs, outputs)(q, k, v, row.ctx.segment_ids, row.ctx.positions)

    def _codes(self, row: Row, q_BTNK, code_BTN, v_BTNV, there_BT) -> tuple[jax.Array, jax.Array]:
        """Attention to every token that has left the window, by code: (o, log-sum-exp)."""
        codes_NCK = jax.lax.stop_gradient(self.codebook[...])
        with jax.default_matmul_precision("highest"):
            score_BTNC = jnp.einsum("btnk,nck->btnc", q_BTNK.astype(jnp.float32), codes_NCK) * self.config.key_dim**-0.5
        top_BTN = jax.lax.stop_gradient(jnp.max(score_BTNC, axis=-1))
        chance_BTNC = save_point(jnp.exp(score_BTNC - top_BTN[..., None]), "recurrence_in")
        place_BTNC = jnp.where(there_BT[..., None, None], jax.nn.one_hot(code_BTN, self.config.codes), 0.0)
        v_BTNV = v_BTNV.astype(jnp.float32)
        counted = jnp.concatenate([v_BTNV, jnp.ones_like(v_BTNV[..., :1])], axis=-1)
        sums = row.linear_recurrence(chance_BTNC, place_BTNC, counted, name="codes", scale=1.0)
        total_BTN = sums[..., -1]
        seen_BTN = total_BTN > 0
        total_BTN = jnp.where(seen_BTN, total_BTN, 1.0)
        lse_BTN = jnp.where(seen_BTN, jnp.log(total_BTN) + top_BTN, EMPTY_LSE)
        return save_point(sums[..., :-1] / total_BTN[..., None], "recurrence_out"), lse_BTN

    def _loss(self, x_BTD: jax.Array, ctx: Context) -> jax.Array:
        """Distance of codes to their keys and of keys to their codes, mean over the batch's tokens and heads."""
        config, stop = self.config, jax.lax.stop_gradient
        k_BTNK = self._key(self._average(x_BTD, Row(ctx)))
        code_BTN = self._nearest(k_BTNK)
        codes_NCK = self.codebook[...]
        taken_BTNK = codes_NCK[jnp.arange(codes_NCK.shape[0]), code_BTN]
        error_BTNK = (stop(k_BTNK) - taken_BTNK) ** 2 + config.commitment * (k_BTNK - stop(taken_BTNK)) ** 2
        real_BT = ctx.is_token
        total = jnp.sum(jnp.where(real_BT[..., None, None], error_BTNK, 0.0))
        return config.codebook_loss * total / (jnp.maximum(jnp.sum(real_BT), 1) * config.num_heads)
