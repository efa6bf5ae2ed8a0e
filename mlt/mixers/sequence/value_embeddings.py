"""Value embeddings: attention whose values take up rows of tables that the token alone points to."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mlt.config.problems import Problem
from mlt.errors import UserError
from mlt.mixers.base import Arrays, Aux, BuildInfo, Context, MixerConfig, Part, Published, save_point, shared_axis
from mlt.mixers.sequence.attention import Attention, AttentionMixer
from mlt.mixers.sizes import not_positive
from mlt.nn.linear import Linear
from mlt.nn.param import normal, param, uniform, zeros
from mlt.parallel import ops

OWN_ROWS = "value embedding"
"""Name in the context under which a layer that publishes nothing finds its rows."""

SPREAD = 256
"""Neighbouring token ids lie in up to this many parts of a table: a tokenizer's first ids are read most."""


class LaVEAttention(Attention):
    """Attention over v_t + g_t E[token_t], with a table E of the layer's own: a layer-wise value embedding.

    g = gate_range * sigmoid(W_g [x[:gate_channels]; E[token][:gate_row_channels]]), one gate a key head. The form and its
    defaults are nanochat's; modded-nanogpt has gate_range 2 with six channels of each. LaVE is the name that MoVE
    (arXiv 2601.22887) gives it.

    Attributes:
        vocab_size: rows of the table, those of the model's embedding.
        gate_range: the largest gate; None has no gate, g = 1.
        gate_channels: first channels of the layer's input that the gate reads.
        gate_row_channels: first channels of the token's row that it reads.
    """

    vocab_size: int
    gate_range: float | None = 3.0
    gate_channels: int = 12
    gate_row_channels: int = 0

    @property
    def table_width(self) -> int:
        """Values of a row of the layer's table."""
        return self.kv_heads * self.head_dim

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from not_positive(self, "vocab_size")
        if self.gate_range is None:
            return
        if self.gate_range <= 0:
            yield Problem("gate_range", self.gate_range, "must be positive", "None has no gate")
        for name in ("gate_channels", "gate_row_channels"):
            if getattr(self, name) < 0:
                yield Problem(name, getattr(self, name), "must not be negative")
        if self.gate_channels == self.gate_row_channels == 0:
            yield Problem("gate_channels", 0, "and gate_row_channels are both 0: the gate reads nothing", "gate_range=None")
        if self.gate_row_channels > self.table_width:
            rule = f"must be at most the width of a row, {self.table_width}"
            yield Problem("gate_row_channels", self.gate_row_channels, rule)

    def build(self, info: BuildInfo) -> "LaVEMixer":
        return LaVEMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        gate = 0 if self.gate_range is None else 2 * (self.gate_channels + self.gate_row_channels) * self.kv_heads
        return super().flops_per_token(d_model, seq_len) + gate + 2 * self.table_width

    def inactive_params(self, d_model: int) -> int:
        return (self.vocab_size - 1) * self.table_width

    @classmethod
    def example(cls) -> tuple["LaVEAttention", BuildInfo]:
        config = cls(num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=64, gate_channels=6, gate_row_channels=6)
        return config, BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class MoVEAttention(Attention):
    """Attention over g_0 v_t + sum over slots i of g_i E[token_t]_i: a mixture of value embeddings (arXiv 2601.22887).

    g = 2 sigmoid(W_g x), one for each key head and slot and one for the head's own value; W_g starts at zero, so that all
    gates start at one. The bank E has `num_slots` rows a token, each cut into the heads. One layer holds it and reads it
    once; what it read is published for the others, which mix it by gates of their own.

    Attributes:
        vocab_size: of the model's embedding: tokens of the bank.
        num_slots: rows a token (M).
        publish_bank: name under which later layers may read the token's rows. The layer holds the bank.
        bank: name of such rows, read in place of a bank of the layer's own.
    """

    vocab_size: int
    num_slots: int
    publish_bank: str | None = None
    bank: str | None = None

    @property
    def table_width(self) -> int:
        """Values of a row of the layer's table, a token's slots; 0 where another layer holds the bank."""
        return 0 if self.bank is not None else self.num_slots * self.kv_heads * self.head_dim

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from not_positive(self, "vocab_size", "num_slots")
        if self.bank is not None and self.publish_bank is not None:
            yield Problem("publish_bank", self.publish_bank, "is for the layer that holds the bank, and `bank` reads another's")

    def build(self, info: BuildInfo) -> "MoVEMixer":
        return MoVEMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        gates = 2 * d_model * self.kv_heads * (self.num_slots + 1)
        mixture = (2 * self.num_slots + 1) * self.kv_heads * self.head_dim
        return super().flops_per_token(d_model, seq_len) + gates + mixture

    def inactive_params(self, d_model: int) -> int:
        return (self.vocab_size - 1) * self.table_width

    def publishes(self, d_model: int) -> Mapping[str, Published]:
        own = {} if self.publish_bank is None else {self.publish_bank: self._rows_part()}
        return {**super().publishes(d_model), **own}

    def reads(self, d_model: int) -> Mapping[str, Published]:
        return {**super().reads(d_model), **({} if self.bank is None else {self.bank: self._rows_part()})}

    def _rows_part(self) -> Published:
        shape = (self.num_slots, self.kv_heads, self.head_dim)
        return {"rows": Part(shape, (None, shared_axis(self.kv_heads), "head_dim"))}

    @classmethod
    def example(cls) -> tuple["MoVEAttention", BuildInfo]:
        config = cls(num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=64, num_slots=3, bank="bank")
        return config, BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)

    @classmethod
    def example_publishers(cls) -> tuple[MixerConfig, ...]:
        return (cls.example()[0].replace(bank=None, publish_bank="bank"),)


class _EmbeddedValues(AttentionMixer):
    """Attention that finds its tokens' rows in the context.

    Attributes:
        table: (vocabulary, M K H), or None where another layer holds it.
        num_slots: rows of a token (M).
        rows_name: what the rows (B, T, M, K, H) are called in the context.
        publishes_rows: whether later layers read them.
    """

    num_slots: int
    rows_name: str
    publishes_rows: bool

    def call_and_publish(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux, dict[str, Arrays]]:
        ctx, own, waiting = self._with_rows(x_BTD, ctx)
        y_BTD, aux, published = super().call_and_publish(x_BTD, ctx)
        return y_BTD, {**aux, **waiting}, {**published, **own}

    def step_and_publish(self, x_BTD: jax.Array, state: Any, ctx: Context) -> tuple[jax.Array, Any, dict[str, Arrays]]:
        ctx, own, _ = self._with_rows(x_BTD, ctx)
        y_BTD, state, published = super().step_and_publish(x_BTD, state, ctx)
        return y_BTD, state, {**published, **own}

    def _with_rows(self, x_BTD, ctx):
        """The context with the tokens' rows in it, those to publish, and the lookup's aux."""
        if self.table is None:
            return ctx, {}, {}
        rows_BT1 = jnp.where(ctx.is_token, dealt_rows(ctx.token_ids, self.config.vocab_size), -1)[..., None]
        found, aux = ops.row_lookup(ctx.rules, self.table[...], rows_BT1, return_waiting=True)
        shape = (*rows_BT1.shape[:2], self.num_slots, self.config.kv_heads, self.config.head_dim)
        rows = {self.rows_name: {"rows": save_point(found.astype(x_BTD.dtype).reshape(shape), "memory_out")}}
        ctx = dataclasses.replace(ctx, published={**ctx.published, **rows})
        return ctx, rows if self.publishes_rows else {}, aux

    def _rows(self, ctx):
        return ctx.published[self.rows_name]["rows"]


class LaVEMixer(_EmbeddedValues):
    def __init__(self, config: LaVEAttention, info: BuildInfo):
        super().__init__(config, info)
        _check_vocabulary(config, info)
        self.num_slots, self.rows_name, self.publishes_rows = 1, OWN_ROWS, False
        # As wide as nanochat draws the projection of values.
        bound = math.sqrt(3 / info.d_model)
        shape = (config.vocab_size, config.table_width)
        self.table = param(shape, ("memory", None), uniform(-bound, bound), group="table")
        if config.gate_range is None:
            self.value_gate = None
            return
        if config.gate_channels > info.d_model:
            raise UserError(f"LaVEAttention: gate_channels = {config.gate_channels} must be at most d_model = {info.d_model}")
        inputs, k = config.gate_channels + config.gate_row_channels, config.kv_heads
        self.value_gate = Linear(((None, inputs),), ((shared_axis(k), k),), init=uniform(0.0, 0.02))

    def _values(self, own_BTKH, x_BTD, ctx):
        config, v_BTKH, row_BTKH = self.config, super()._values(own_BTKH, x_BTD, ctx), self._rows(ctx)[:, :, 0]
        if self.value_gate is None:
            return v_BTKH + row_BTKH
        flat = row_BTKH.reshape(*row_BTKH.shape[:2], -1)
        seen = jnp.concatenate([x_BTD[..., : config.gate_channels], flat[..., : config.gate_row_channels]], axis=-1)
        gate_BTK = config.gate_range * jax.nn.sigmoid(self.value_gate(seen).astype(jnp.float32))
        return (v_BTKH + gate_BTK[..., None] * row_BTKH).astype(v_BTKH.dtype)


class MoVEMixer(_EmbeddedValues):
    def __init__(self, config: MoVEAttention, info: BuildInfo):
        super().__init__(config, info)
        _check_vocabulary(config, info)
        self.num_slots, self.publishes_rows = config.num_slots, config.publish_bank is not None
        self.rows_name = config.bank or config.publish_bank or OWN_ROWS
        shape = (config.vocab_size, config.table_width)
        self.table = None if config.bank is not None else param(shape, ("memory", None), normal(0.02), group="table")
        gates = ((shared_axis(config.kv_heads), config.kv_heads), (None, config.num_slots + 1))
        self.value_gate = Linear((("embed", info.d_model),), gates, init=zeros)

    def _values(self, own_BTKH, x_BTD, ctx):
        v_BTKH = super()._values(own_BTKH, x_BTD, ctx)
        gate_BTKS = 2.0 * jax.nn.sigmoid(self.value_gate(x_BTD).astype(jnp.float32))
        weights = gate_BTKS[..., 1:].astype(v_BTKH.dtype)
        mixed = jnp.einsum("btkm,btmkh->btkh", weights, self._rows(ctx), preferred_element_type=jnp.float32)
        return (gate_BTKS[..., :1] * v_BTKH + mixed).astype(v_BTKH.dtype)


def dealt_rows(token_ids: jax.Array, vocab_size: int) -> jax.Array:
    """Row of each token id, -1 for no id: neighbours dealt out, so that each owner gets rare and frequent tokens."""
    parts = math.gcd(vocab_size, SPREAD)
    rows = token_ids % parts * (vocab_size // parts) + token_ids // parts
    return jnp.where((token_ids >= 0) & (token_ids < vocab_size), rows, -1)


def _check_vocabulary(config: LaVEAttention | MoVEAttention, info: BuildInfo) -> None:
    if config.vocab_size != info.vocab_size:
        raise UserError(
            f"{type(config).__name__}: vocab_size = {config.vocab_size} must be the model's vocab_size, {info.vocab_size}: "
            "the table has a row for each token id"
        )
