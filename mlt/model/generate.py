"""Text from a model, one token at a time, from the mixers' decoding states: the prompt is never run again."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlt.mixers.base import CLUSTERS, Context
from mlt.model.lm import LM
from mlt.model.mixture import log_mixture
from mlt.parallel.rules import Rules

PREFILL_MULTIPLE = 64


def generate(
    model: LM,
    prompt_ids: np.ndarray,
    *,
    tokens: int,
    temperature: float,
    key: jax.Array,
    rules: Rules,
    dtype: jnp.dtype,
    drawable_V: np.ndarray,
    end_id: int,
    cluster: int = -1,
    memory: LM | None = None,
    share: float = 0.0,
) -> np.ndarray:
    """Continue a prompt.

    Args:
        model: parameters.
        prompt_ids: (P,) token ids of one document from its start, P >= 1.
        tokens: how many to draw.
        temperature: of the softmax; 0 takes the most likely token.
        key: random key of the draw.
        rules: layout.
        dtype: compute type.
        drawable_V: (V,) bool, the ids that may be drawn; the rest of the vocabulary is padding.
        end_id: the id that ends a document; nothing behind it is returned.
        cluster: of the document, for models that read it; -1 for none.
        memory: a second model of the same tokens, with a decoding state of its own (Memory Decoder, arXiv 2508.09874).
        share: of its probabilities in the mixture that tokens are drawn from; 0 draws from the model alone.

    Returns:
        Up to (tokens,) int32 drawn ids.
    """
    # Padding on the left keeps the number of compiled prompt lengths small; it is segment 0, which nothing sees.
    length = -(-len(prompt_ids) // PREFILL_MULTIPLE) * PREFILL_MULTIPLE
    pad = length - len(prompt_ids)
    ids = np.concatenate([np.zeros(pad, np.int32), prompt_ids])[None].astype(np.int32)
    segments = (np.arange(length) >= pad).astype(np.int32)[None]
    positions = np.maximum(np.arange(length) - pad, 0).astype(np.int32)[None]
    # A model may have more rows than its tokenizer has ids.
    forbidden_V = np.zeros(model.config.vocab_size, np.float32)
    forbidden_V[len(drawable_V) :] = -np.inf
    forbidden_V[: len(drawable_V)][~drawable_V] = -np.inf
    draw = _drawer(rules, jnp.dtype(dtype), tokens, temperature == 0.0)
    others = (jnp.float32(max(temperature, 1e-6)), key, np.int32(cluster), jnp.float32(share))
    models = (model,) if memory is None or share == 0.0 else (model, memory)
    drawn = np.asarray(draw(models, ids, segments, positions, forbidden_V, *others))
    ends = np.flatnonzero(drawn == end_id)
    return drawn[: ends[0]] if len(ends) else drawn


@functools.lru_cache(maxsize=16)
def _drawer(rules: Rules, dtype: jnp.dtype, tokens: int, greedy: bool):
    """The compiled function for one length and mode."""

    def advance(models: tuple[LM, ...], states: tuple[Any, ...], context: Context) -> tuple[list[jax.Array], tuple[Any, ...]]:
        """What each model's head reads at the last token (B, D), and their states behind it."""
        steps = [model.step(state, context, dtype=dtype) for model, state in zip(models, states, strict=True)]
        return [hidden_BTD[:, -1] for hidden_BTD, _ in steps], tuple(state for _, state in steps)

    def pick(models, hidden, forbidden_V, temperature, key, share) -> jax.Array:
        logits = [model.logits(hidden_BD[:, None])[:, 0] for model, hidden_BD in zip(models, hidden, strict=True)]
        if len(models) > 1:
            logits = [log_mixture(*(jax.nn.log_softmax(logits_BV) for logits_BV in logits), share)]
        logits_BV = logits[0] + forbidden_V
        if greedy:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        return jax.random.categorical(key, logits_BV / temperature).astype(jnp.int32)

    @jax.jit
    def run(models, ids_BT, segments_BT, positions_BT, forbidden_V, temperature, key, cluster, share):
        rows = lambda like_BT: {CLUSTERS: jnp.broadcast_to(cluster, like_BT.shape)}  # noqa: E731
        states = tuple(model.init_state(ids_BT.shape[0], ids_BT.shape[1] + tokens, dtype) for model in models)
        context = Context(ids_BT, segments_BT, positions_BT, rules, False, rows=rows(ids_BT))
        hidden, states = advance(models, states, context)
        first = pick(models, hidden, forbidden_V, temperature, jax.random.fold_in(key, 0), share)

        def body(carry, index):
            token_B, position_B, states = carry
            one_B1, token_B1 = jnp.ones_like(token_B)[:, None], token_B[:, None]
            context = Context(token_B1, one_B1, position_B[:, None], rules, False, rows=rows(token_B1))
            hidden, states = advance(models, states, context)
            following = pick(models, hidden, forbidden_V, temperature, jax.random.fold_in(key, index), share)
            return (following, position_B + 1, states), following

        start = (first, positions_BT[:, -1] + 1, states)
        _, rest_TB = jax.lax.scan(body, start, jnp.arange(1, tokens))
        return jnp.concatenate([first[None], rest_TB])[:, 0]

    return run
