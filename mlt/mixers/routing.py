"""What routers have in common beside their scores: groups, chunks, balance losses, and what is told about them."""

import jax
import jax.numpy as jnp

from mlt.mixers.base import Aux
from mlt.parallel import ops, sequence
from mlt.parallel.local import TOKENS, local
from mlt.parallel.rules import Rules

EACH_EXPERT = (*TOKENS, None)


def row_load(experts_BTA: jax.Array, is_token_BT: jax.Array, num_experts: int) -> jax.Array:
    """Tokens of each row that go to each expert, (B, E) int32. Padding does not count."""
    hits = experts_BTA[..., None] == jnp.arange(num_experts)
    return (hits & is_token_BT[..., None, None]).sum((1, 2), dtype=jnp.int32)


def inside_best_groups(ranked_BTE: jax.Array, num_groups: int, kept: int, rules: Rules) -> jax.Array:
    """Rule out the experts outside each token's best groups, a group being worth its two best experts."""
    grouped = ranked_BTE.reshape(*ranked_BTE.shape[:-1], num_groups, ranked_BTE.shape[-1] // num_groups)
    worth = ops.top_k(rules, grouped, 2, (*EACH_EXPERT, None))[0].sum(-1)
    best = ops.top_k(rules, worth, kept, EACH_EXPERT)[1]
    is_best = (best[..., None] == jnp.arange(num_groups)).any(-2)
    return jnp.where(is_best[..., None], grouped, -jnp.inf).reshape(ranked_BTE.shape)


def chunk_heads(logits_BTE: jax.Array, positions_BT: jax.Array, chunk_len: int, rules: Rules) -> jax.Array:
    """The logits of the first token of each token's chunk, chunks being counted from the document's start.

    A sequence shard gets the `chunk_len - 1` tokens in front of it, and no other.
    """
    shards, front = rules.size("seq"), chunk_len - 1

    def run(logits, positions):
        if shards == 1:
            return from_heads(logits, positions, chunk_len)
        logits, positions = sequence.with_front((logits, positions), front, shards)
        return from_heads(logits, positions, chunk_len)[:, front:]

    return local(run, rules, (EACH_EXPERT, TOKENS), EACH_EXPERT)(logits_BTE, positions_BT)


def from_heads(logits_BTE: jax.Array, positions_BT: jax.Array, chunk_len: int, earlier_BE: jax.Array | None = None) -> jax.Array:
    """`chunk_heads` of tokens at hand. A head in front of them has the logits `earlier_BE`; without, those of token 0."""
    head_BT1 = (jnp.arange(positions_BT.shape[1]) - positions_BT % chunk_len)[..., None]
    found_BTE = jnp.take_along_axis(logits_BTE, jnp.maximum(head_BT1, 0), axis=1)
    return found_BTE if earlier_BE is None else jnp.where(head_BT1 < 0, earlier_BE[:, None], found_BTE)


def row_balance(scores_BTE: jax.Array, load_BE: jax.Array, is_token_BT: jax.Array, experts_per_token: int) -> jax.Array:
    """Mean over rows of sum_i f_i P_i: experts' use and mean share of the scores in a row, 1 under an even load, ()."""
    tokens_B1 = jnp.maximum(is_token_BT.sum(1, keepdims=True), 1).astype(jnp.float32)
    return (_used(load_BE, experts_per_token) * _shares(scores_BTE, is_token_BT) / tokens_B1**2).sum(-1).mean()


def global_balance(
    scores_BTE: jax.Array,
    load_BE: jax.Array,
    is_token_BT: jax.Array,
    experts_per_token: int,
    load_before_E: jax.Array | None = None,
) -> jax.Array:
    """The same with use and share over all tokens of the call, whatever their row or device, ().

    Args:
        load_before_E: tokens of each expert in earlier calls, which the use is over as well; the share is this call's.
    """
    tokens = jnp.maximum(is_token_BT.sum(), 1).astype(jnp.float32)
    load_E, counted = load_BE.sum(0), tokens
    if load_before_E is not None:
        load_E = load_E + load_before_E
        counted = jnp.maximum(load_E.sum() / experts_per_token, 1.0)
    return (_used(load_E, experts_per_token) * _shares(scores_BTE, is_token_BT).sum(0) / (counted * tokens)).sum()


def z_term(logits_BTE: jax.Array, is_token_BT: jax.Array) -> jax.Array:
    """Mean over rows of the mean square of the log-sum-exp of the logits, ()."""
    return mean_of_rows(jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1)), is_token_BT)


def mean_of_rows(x_BT: jax.Array, is_token_BT: jax.Array) -> jax.Array:
    """Mean over rows of the mean over a row's tokens, ()."""
    return ((x_BT * is_token_BT).sum(1) / jnp.maximum(is_token_BT.sum(1), 1)).mean()


def told(logits_BTE: jax.Array, is_token_BT: jax.Array, bias_E: jax.Array | None) -> Aux:
    """What the metrics show of a router beside its load: the size of its logits and the range of its biases."""
    largest_BT = jnp.abs(jax.lax.stop_gradient(logits_BTE)).max(-1)
    aux = {"metric/router_logit": mean_of_rows(largest_BT, is_token_BT)}
    return aux if bias_E is None else aux | {"metric/router_bias_range": bias_E.max() - bias_E.min()}


def _used(load: jax.Array, experts_per_token: int) -> jax.Array:
    """Tokens of each expert over its even share of one token: f_i times the tokens."""
    return load * (load.shape[-1] / experts_per_token)


def _shares(scores_BTE: jax.Array, is_token_BT: jax.Array) -> jax.Array:
    """Sum over a row's tokens of each expert's share of the scores, (B, E)."""
    share_BTE = scores_BTE / (scores_BTE.sum(-1, keepdims=True) + 1e-20)
    return (share_BTE * is_token_BT[..., None]).sum(1)
