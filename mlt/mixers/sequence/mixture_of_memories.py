"""Mixture of memories (MoM, arXiv 2502.13685): several recurrent states, of which each token writes and reads a few."""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from mlt.config.problems import Problem
from mlt.mixers.base import Aux, BuildInfo, Context, SequenceMixerConfig, save_point
from mlt.mixers.conv import CausalConv
from mlt.mixers.recurrent import Continuation, RecurrentMixer, Row, empty_state
from mlt.mixers.sizes import not_positive, recurrence_flops
from mlt.nn.linear import Linear
from mlt.nn.norm import RMSNorm, l2_normalize
from mlt.nn.param import fan_in, inverse_softplus_of_step, log_of_uniform, param

GLA_TEMPERATURE = 16.0


class MixtureOfMemories(SequenceMixerConfig):
    """Memory m of a token that chose it:  S^m <- rule(S^m, k^m, v^m, gates^m);  o = sum over chosen of w_m S^m^T q.

    A router softmax(x W_r) chooses `memories_per_token` of `num_memories`; w are its probabilities divided by their sum.
    The shared memory is written and read by every token with weight 1. q is shared by the memories, keys, values and
    gates are projections of each; out = W_o (norm(o) * silu(x W_g)).

    A memory that a token did not choose takes decay 1 and no write from it: states and outputs are those of running each
    memory on its own tokens, nothing is dropped, and neither order nor number of other tokens matters. All memories run
    over all tokens, which costs the recurrence of every memory in place of the chosen ones, and in return splits over
    sequence shards. `sorted` runs the chosen ones alone: each token comes once for each, in a stream sorted by (document,
    memory, time) whose runs are the documents of one recurrence, without a capacity. It is the same function; as later
    tokens move a memory's run in the stream, they move the rounding of earlier outputs (nothing else), and so it is not the
    default. The convolutions on q, k and v run over neighbouring tokens of the document, before memories are chosen;
    published code runs them over the tokens of a memory, where they see later tokens of other memories.

    Rules of the states:

        gated_delta       S <- e^g (I - beta k k^T) S + beta k v^T, L2-normalized q and k; A_log and dt_bias shared
        delta             the same without decay
        gated_linear      S <- diag(e^g) S + k v^T, g = log_sigmoid(x W_a) / 16 for each key channel
        linear            S <- S + k v^T

    Attributes:
        num_heads: heads (H).
        key_dim: width of a query or key (K).
        value_dim: width of a value (V); None means key_dim.
        num_memories: routed memories (M).
        memories_per_token: of these, how many a token writes and reads.
        shared_memory: whether there is one more that all tokens use.
        rule: how a memory is written.
        conv_width: taps of the short convolutions on q, k and v.
        balance_loss: coefficient of M * sum over m of (share of choices) * (mean probability), per row. It couples the
            gradients of packed documents.
        sorted: whether whole sequences run the chosen memories alone; decoding and split sequences run all of them.
    """

    context: ClassVar[str] = "carry"
    op: ClassVar[str] = "linear_recurrence"

    num_heads: int
    key_dim: int
    value_dim: int | None = None
    num_memories: int = 4
    memories_per_token: int = 2
    shared_memory: bool = True
    rule: Literal["gated_delta", "delta", "gated_linear", "linear"] = "gated_delta"
    conv_width: int = 4
    balance_loss: float = 0.0
    sorted: bool = False

    @property
    def values(self) -> int:
        return self.value_dim or self.key_dim

    @property
    def memories(self) -> int:
        """All memories (R), the shared one last."""
        return self.num_memories + self.shared_memory

    @property
    def is_delta(self) -> bool:
        return self.rule in ("gated_delta", "delta")

    def problems(self) -> Iterator[Problem]:
        yield from not_positive(self, "num_heads", "key_dim", "value_dim", "num_memories", "memories_per_token", "conv_width")
        if self.memories_per_token == 1:
            yield Problem(
                "memories_per_token", 1, "must be at least 2: a single weight is always 1 and teaches the router nothing"
            )
        if self.memories_per_token > self.num_memories:
            yield Problem("memories_per_token", self.memories_per_token, f"must be at most num_memories = {self.num_memories}")
        if self.balance_loss < 0:
            yield Problem("balance_loss", self.balance_loss, "must not be negative")

    def build(self, info: BuildInfo) -> "MixtureOfMemoriesMixer":
        return MixtureOfMemoriesMixer(self, info)

    def _gates(self) -> int:
        """Gate values of one head of one memory."""
        return {"gated_delta": 2, "delta": 1, "gated_linear": self.key_dim, "linear": 0}[self.rule]

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        h, r, k, v = self.num_heads, self.memories, self.key_dim, self.values
        channels = h * (k + r * (k + v))
        projections = 2 * d_model * (channels + h * (2 * v + r * self._gates()) + self.num_memories)
        rule = "delta" if self.is_delta else "add"
        runs = self.memories_per_token + self.shared_memory if self.sorted else r
        return projections + 2 * self.conv_width * channels + recurrence_flops(h * runs, k, v, seq_len, rule=rule)

    def state_size(self, d_model: int, seq_len: int) -> int:
        h, r, k, v = self.num_heads, self.memories, self.key_dim, self.values
        return h * r * k * v + (self.conv_width - 1) * h * (k + r * (k + v))

    @classmethod
    def example(cls) -> tuple["MixtureOfMemories", BuildInfo]:
        config = cls(num_heads=2, key_dim=8, value_dim=16, num_memories=3)
        return config, BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class MixtureOfMemoriesMixer(RecurrentMixer):
    def __init__(self, config: MixtureOfMemories, info: BuildInfo):
        self.config = config
        d, h, k, v = info.d_model, config.num_heads, config.key_dim, config.values
        stream, gates = (("embed", d),), (("heads", h), (None, config.memories))
        queries, keys, values = (("heads", h), ("head_dim", k)), (*gates, ("head_dim", k)), (*gates, ("head_dim", v))
        out = (("heads", h), ("head_dim", v))
        self.router = Linear(stream, ((None, config.num_memories),))
        self.query = Linear(stream, queries)
        self.key = Linear(stream, keys)
        self.value = Linear(stream, values)
        self.gate = Linear(stream, out)
        self.query_conv = CausalConv(queries, width=config.conv_width)
        self.key_conv = CausalConv(keys, width=config.conv_width)
        self.value_conv = CausalConv(values, width=config.conv_width)
        scalar = config.rule == "gated_delta"
        self.beta = Linear(stream, gates) if config.is_delta else None
        self.decay = Linear(stream, gates if scalar else keys) if scalar or config.rule == "gated_linear" else None
        self.A_log = param((h,), ("heads",), log_of_uniform(1.0, 16.0)) if scalar else None
        self.dt_bias = param((h,), ("heads",), inverse_softplus_of_step()) if scalar else None
        self.norm = RMSNorm(v)
        self.output = Linear(out, stream, init=fan_in(h * v, scale=info.residual_scale))

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        y_BTD, _ = super().__call__(x_BTD, ctx)
        return y_BTD, {"loss/balance": self._balance(x_BTD, ctx)} if self.config.balance_loss else {}

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> Any:
        config = self.config
        convs = {"query": self.query_conv, "key": self.key_conv, "value": self.value_conv}
        memory = (config.num_heads * config.memories, config.key_dim, config.values)
        return empty_state(batch, dtype, convs, memory=memory)

    def mix(self, x_BTD: jax.Array, row: Row) -> jax.Array:
        config = self.config
        q_BTHK = row.conv("query", self.query_conv, self.query(x_BTD))
        k_BTHRK = row.conv("key", self.key_conv, self.key(x_BTD))
        v_BTHRV = row.conv("value", self.value_conv, self.value(x_BTD))
        if config.is_delta:
            q_BTHK, k_BTHRK = l2_normalize(q_BTHK), l2_normalize(k_BTHRK)
        probability_BTM, index_BTA = self._route(x_BTD)
        chosen_BTM = self._chosen(index_BTA)
        weight_BTR, chosen_BTR = self._weights(probability_BTM, chosen_BTM)
        decay, beta_BTHR = self._gate_values(x_BTD, chosen_BTR)
        gates = {"log_decay": decay, "beta": beta_BTHR}
        if config.sorted and not isinstance(row, Continuation) and row.ctx.rules.size("seq") == 1:
            o_BTHV = self._sorted(q_BTHK, k_BTHRK, v_BTHRV, gates, weight_BTR, index_BTA, row)
        else:
            o_BTHRV = self._recur(row, q_BTHK, k_BTHRK, v_BTHRV, gates)
            o_BTHV = jnp.einsum("bthrv,btr->bthv", o_BTHRV.astype(jnp.float32), weight_BTR)
        return self.output(self.norm(o_BTHV.astype(x_BTD.dtype)) * jax.nn.silu(self.gate(x_BTD)))

    def _recur(self, row: Row, q_BTHK: jax.Array, k_BTHRK: jax.Array, v_BTHRV: jax.Array, gates: dict[str, Any]) -> jax.Array:
        """What R memories answer, (B, T, H, R, V). They are heads to the recurrence, those of one head side by side."""
        q_BTHRK = jnp.broadcast_to(q_BTHK[:, :, :, None], k_BTHRK.shape)
        q, k, v = (_joined(x) for x in (q_BTHRK, k_BTHRK, v_BTHRV))
        gates = {name: None if x is None else _joined(x) for name, x in gates.items()}
        rule = "delta" if self.config.is_delta else "add"
        o = row.linear_recurrence(q, k, v, rule=rule, implementation=self.config.kernel, **gates)
        return save_point(o, "recurrence_out").reshape(v_BTHRV.shape)

    def _sorted(self, q_BTHK, k_BTHRK, v_BTHRV, gates, weight_BTR, index_BTA, row):
        """The weighted sum of what the chosen memories and the shared one answer, (B, T, H, V) float32."""
        config, segments = self.config, row.ctx.segment_ids
        B, T, A = index_BTA.shape
        # Documents are in order in a row, so that each keeps its place whatever the others choose. Padding comes last.
        document_BT = jnp.cumsum(segments != jnp.pad(segments, ((0, 0), (1, 0)))[:, :-1], axis=1, dtype=jnp.int32)
        key_BTA = 1 + document_BT[..., None] * config.num_memories + index_BTA.astype(jnp.int32)
        key_BS = jnp.where(segments[..., None] == 0, jnp.iinfo(jnp.int32).max, key_BTA).reshape(B, T * A)
        order_BS = jnp.argsort(key_BS, axis=1, stable=True)
        key_BS = jnp.take_along_axis(key_BS, order_BS, axis=1)
        inverse_BS = jnp.argsort(order_BS, axis=1)
        token_BS, memory_BS = order_BS // A, jnp.take_along_axis(index_BTA.reshape(B, T * A), order_BS, axis=1)
        stream = jnp.where(key_BS == jnp.iinfo(jnp.int32).max, 0, key_BS)
        ctx = dataclasses.replace(row.ctx, segment_ids=stream, positions=jnp.zeros_like(stream), token_ids=jnp.zeros_like(stream))
        of_memory = jax.vmap(lambda x, token, memory: x[token, :, memory])
        pick = lambda x: of_memory(x, token_BS, memory_BS)[:, :, :, None]  # noqa: E731
        q_BSHK = jax.vmap(lambda x, token: x[token])(q_BTHK, token_BS)
        parts = {name: None if x is None else pick(x) for name, x in gates.items()}
        o_BSHV = self._recur(Row(ctx), q_BSHK, pick(k_BTHRK), pick(v_BTHRV), parts)[:, :, :, 0]
        o_BTAHV = jnp.take_along_axis(o_BSHV, inverse_BS[..., None, None], axis=1).reshape(B, T, A, *o_BSHV.shape[2:])
        weight_BTA = jnp.take_along_axis(weight_BTR, index_BTA, axis=2)
        total = jnp.einsum("btahv,bta->bthv", o_BTAHV.astype(jnp.float32), weight_BTA)
        if not config.shared_memory:
            return total
        last = {name: None if x is None else x[:, :, :, -1:] for name, x in gates.items()}
        shared = self._recur(row, q_BTHK, k_BTHRK[:, :, :, -1:], v_BTHRV[:, :, :, -1:], last)
        return total + shared[:, :, :, 0].astype(jnp.float32)

    def _route(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Probabilities (B, T, M) float32, and the memories (B, T, A) that a token takes."""
        probability_BTM = jax.nn.softmax(self.router(x_BTD.astype(jnp.float32)), axis=-1)
        return probability_BTM, jax.lax.top_k(probability_BTM, self.config.memories_per_token)[1]

    def _chosen(self, index_BTA: jax.Array) -> jax.Array:
        """(B, T, M) bool."""
        return jnp.any(index_BTA[..., None] == jnp.arange(self.config.num_memories), axis=2)

    def _weights(self, probability_BTM: jax.Array, chosen_BTM: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Weights and choices of all memories, the shared one last."""
        taken_BTM = jnp.where(chosen_BTM, probability_BTM, 0.0)
        weight_BTM = taken_BTM / taken_BTM.sum(-1, keepdims=True)
        if not self.config.shared_memory:
            return weight_BTM, chosen_BTM
        one = ((0, 0), (0, 0), (0, 1))
        return jnp.pad(weight_BTM, one, constant_values=1.0), jnp.pad(chosen_BTM, one, constant_values=True)

    def _gate_values(self, x_BTD: jax.Array, chosen_BTR: jax.Array) -> tuple[jax.Array | None, jax.Array]:
        """Log decays (B, T, H, R) or (B, T, H, R, K) or None, and write strengths (B, T, H, R): 0 where not chosen."""
        chosen_BT1R = chosen_BTR[:, :, None]
        beta_BTHR = jnp.ones(()) if self.beta is None else jax.nn.sigmoid(self.beta(x_BTD).astype(jnp.float32))
        shape = (*chosen_BTR.shape[:2], self.config.num_heads, self.config.memories)
        beta_BTHR = jnp.broadcast_to(jnp.where(chosen_BT1R, beta_BTHR, 0.0), shape)
        if self.decay is None:
            return None, beta_BTHR
        pre = self.decay(x_BTD).astype(jnp.float32)
        if self.A_log is None or self.dt_bias is None:
            return jnp.where(chosen_BT1R[..., None], jax.nn.log_sigmoid(pre) / GLA_TEMPERATURE, 0.0), beta_BTHR
        decay_BTHR = -jnp.exp(self.A_log[...])[:, None] * jax.nn.softplus(pre + self.dt_bias[...][:, None])
        return jnp.where(chosen_BT1R, decay_BTHR, 0.0), beta_BTHR

    def _balance(self, x_BTD: jax.Array, ctx: Context) -> jax.Array:
        config = self.config
        probability_BTM, index_BTA = self._route(x_BTD)
        chosen_BTM = self._chosen(index_BTA)
        real_BT1 = ctx.is_token[..., None]
        tokens_B1 = jnp.maximum(real_BT1.sum(1), 1)
        used_BM = jnp.where(real_BT1, chosen_BTM, 0.0).sum(1) / (tokens_B1 * config.memories_per_token)
        share_BM = jnp.where(real_BT1, probability_BTM, 0.0).sum(1) / tokens_B1
        return config.balance_loss * config.num_memories * (used_BM * share_BM).sum(-1).mean()


def _joined(x: jax.Array) -> jax.Array:
    """(B, T, H, R, ...) -> (B, T, H R, ...), named for the memory policy."""
    return save_point(x.reshape(*x.shape[:2], -1, *x.shape[4:]), "recurrence_in")
