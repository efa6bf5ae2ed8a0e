"""The one model class: embed, stack, norm, head."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mlt.config.base import Config
from mlt.config.problems import Problem
from mlt.mixers.base import BuildInfo, Context
from mlt.model.block import STREAM
from mlt.model.edges import edge_problems
from mlt.model.remat import Remat
from mlt.model.stack import Stack, StackAux, StackModule
from mlt.nn.embed import Embedding
from mlt.nn.norm import NormKind, stream_norm
from mlt.nn.param import fan_in, param
from mlt.parallel import ops
from mlt.parallel.rules import Rules


class LMConfig(Config):
    """A language model. Families are values of this config, never classes of their own.

    Attributes:
        d_model: width of the residual stream (D).
        vocab_size: rows of the embedding and columns of the head (V); at least the tokenizer's.
        stack: the blocks.
        tie_embeddings: the head is the transposed embedding.
        embed_std: standard deviation of the embedding at initialization.
        logit_softcap: logits become cap * tanh(logit / cap).
        norm_eps: of the final norm.
        norm: `rms` or `layer`, of the final norm; blocks have their own.
        unit_offset_norm: the final norm multiplies by 1 + scale.
        embed_scale: factor on the embedded tokens.
        logit_scale: factor on the logits, applied to what they are made of.
    """

    d_model: int
    vocab_size: int
    stack: Stack
    tie_embeddings: bool = False
    embed_std: float = 0.02
    logit_softcap: float | None = None
    norm_eps: float = 1e-6
    norm: NormKind = "rms"
    unit_offset_norm: bool = False
    embed_scale: float = 1.0
    logit_scale: float = 1.0

    def problems(self) -> Iterator[Problem]:
        for name in ("d_model", "vocab_size"):
            if getattr(self, name) < 1:
                yield Problem(name, getattr(self, name), "must be at least 1")
        if self.logit_softcap is not None and self.logit_softcap <= 0:
            yield Problem("logit_softcap", self.logit_softcap, "must be positive", "None turns it off")
        yield from (problem.under("stack") for problem in edge_problems(self.stack, self.d_model))

    def info(self, token_strings: tuple[str, ...] | None = None) -> BuildInfo:
        """What the mixers may know of this model."""
        count = len(self.stack.mixers())
        return BuildInfo(self.d_model, count, self.vocab_size, token_strings)

    def build(self, token_strings: tuple[str, ...] | None = None) -> "LM":
        """The model as a tree of described parameters; `nn.param.initialize` makes them.

        Args:
            token_strings: the tokenizer's raw text per id, needed by mixers that compress token ids.
        """
        return LM(self, self.info(token_strings))


class LM(nnx.Module):
    def __init__(self, config: LMConfig, info: BuildInfo):
        self.config = config
        self.embed = Embedding(config.vocab_size, config.d_model, std=config.embed_std)
        self.stack = config.stack.build(info)
        self.norm = stream_norm(config.norm, config.d_model, eps=config.norm_eps, unit_offset=config.unit_offset_norm)
        shape = (config.d_model, config.vocab_size)
        head = None if config.tie_embeddings else param(shape, ("embed", "vocab"), fan_in(config.d_model), group="embedding")
        self.head = head

    def __call__(self, ctx: Context, *, dtype: jnp.dtype, remat: Remat) -> tuple[jax.Array, StackAux]:
        """Final hidden states (B, T, D) in `dtype`, and every mixer's aux."""
        x_BTD, aux = self.stream(ctx, dtype=dtype, remat=remat)
        return self._final(x_BTD), aux

    def stream(self, ctx: Context, *, dtype: jnp.dtype, remat: Remat) -> tuple[jax.Array, StackAux]:
        """What `__call__` gives, in front of the final norm."""
        x_BTD = ctx.rules.constrain(self._embedded(ctx, dtype), STREAM)
        return self.stack(x_BTD, ctx, remat)

    def unembedding(self) -> jax.Array:
        """(D, V) matrix that turns hidden states into logits."""
        return self.embed.table[...].T if self.head is None else self.head[...]

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """(B, T, V) float32. Training never calls this: the loss works in chunks."""
        logits = jnp.dot(hidden_BTD, self.unembedding().astype(hidden_BTD.dtype), preferred_element_type=jnp.float32)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> Any:
        """Decoding state before the first token, for up to `max_length` tokens."""
        return self.stack.init_state(batch, max_length, dtype)

    def step(self, state: Any, ctx: Context, *, dtype: jnp.dtype) -> tuple[jax.Array, Any]:
        """Hidden states of T more tokens and the state behind them."""
        # A few tokens of one row cannot be cut over a mesh: the partitioner lays decoding out, from where parameters lie.
        ctx = dataclasses.replace(ctx, rules=Rules(None))
        x_BTD, state = self.stack.step(self._embedded(ctx, dtype), state, ctx)
        return self._final(x_BTD), state

    def updated(self, aux: StackAux) -> "LM":
        """The model with its buffers moved on after an optimizer step."""
        return self._with(self.stack.updated(aux))

    def within_step(self, aux: StackAux) -> "LM":
        """The model for the next micro-batch of a step, given the aux summed over those before it."""
        return self._with(self.stack.within_step(aux))

    def _with(self, stack: StackModule) -> "LM":
        new = jax.tree.map(lambda leaf: leaf, self)
        new.stack = stack
        return new

    def _embedded(self, ctx: Context, dtype: jnp.dtype) -> jax.Array:
        x_BTD = ops.embedding(ctx.rules, self.embed.table[...], ctx.token_ids, dtype)
        return x_BTD if self.config.embed_scale == 1.0 else x_BTD * self.config.embed_scale

    def _final(self, x_BTD: jax.Array) -> jax.Array:
        x_BTD = self.norm(x_BTD)
        return x_BTD if self.config.logit_scale == 1.0 else x_BTD * self.config.logit_scale
