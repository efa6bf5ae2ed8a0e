"""The state of a recurrence in front of a sequence shard, made of what every shard does to one (`carry.py`).

A shard knows its transition, from the decays of its tokens or from the recurrence itself, and what it makes of an empty state.
"""

from typing import Any

import jax
import jax.numpy as jnp
import mlt_kernels
from mlt_kernels.linear_recurrence import NormalizedState
from mlt_kernels.linear_recurrence.reference import EMPTY_LOG_SCALE

from mlt.parallel import carry, sequence
from mlt.parallel.rules import Rules


def carried(rules: Rules, segments_BT: jax.Array, transition: Any, end: Any, algebra: Any) -> Any:
    """The state in front of this shard.

    Args:
        transition: what this shard does to a state that enters it.
        end: what it makes of an empty one.
        algebra: how the two compose over shards, one of `carry`'s.
    """
    size = rules.size("seq")
    zero = jax.tree.map(jnp.zeros_like, (transition, end))
    passes_B = sequence.goes_on(segments_BT, size)
    return carry.incoming(transition, end, zero, passes_B, algebra, rules.carry, size)


def of_linear_recurrence(rules, q, k, v, *, log_decay, beta, log_input, segment_ids, normalizer="none", **options):
    """The initial state of `mlt_kernels.linear_recurrence` on this shard, from the same arguments."""
    segments = sequence.segments_of(q, segment_ids)
    gates = {"log_decay": log_decay, "beta": beta, "log_input": log_input, "segment_ids": segments}

    def final(v, start):
        run = mlt_kernels.linear_recurrence
        return run(q, k, v, initial_state=start, normalizer=normalizer, return_final_state=True, **gates, **options)[1]

    B, _, H, V = v.shape
    K = k.shape[-1]
    if options.get("rule") == "delta":
        # The transition is a product of matrices: what the recurrence makes of the identity when it writes nothing.
        values = jnp.concatenate([v, jnp.zeros((*v.shape[:3], K), v.dtype)], axis=-1)
        eye = jnp.broadcast_to(jnp.eye(K, dtype=jnp.float32), (B, H, K, K))
        both = final(values, jnp.concatenate([jnp.zeros((B, H, K, V), jnp.float32), eye], axis=-1))
        whole = sequence.one_document(segments)[:, None, None, None]
        transition = jnp.where(whole, both[..., V:], 0.0)
        return carried(rules, segments, transition, both[..., :V], carry.MATRIX)
    total, whole = _total_decay(log_decay, segments, H)
    if normalizer != "none":
        return _normalized(rules, segments, total, whole, final(v, None), normalizer)
    whole = whole.reshape(-1, *[1] * (total.ndim - 1))
    transition = jnp.where(whole, jnp.exp(total), 0.0)
    return carried(rules, segments, transition, final(v, None), carry.SCALED)


def _total_decay(log_decay, segments, heads):
    """Log decay over the whole shard, (B, H) or (B, H, K), and whether it is one document, (B,)."""
    B, T = segments.shape
    if log_decay is None:
        log_decay = jnp.zeros((heads,), jnp.float32)
    if log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay, (B, T, heads))
    real = (segments != 0).reshape(B, T, *[1] * (log_decay.ndim - 2))
    return jnp.where(real, log_decay.astype(jnp.float32), 0.0).sum(1), sequence.one_document(segments)


def _normalized(rules, segments, total, whole, state, normalizer):
    empty = 0.0 if normalizer == "mlstm" else EMPTY_LOG_SCALE
    nothing = NormalizedState(jnp.zeros_like(state.value), jnp.zeros_like(state.key_sum), jnp.full_like(state.log_scale, empty))
    keep = jnp.broadcast_to(whole[:, None], total.shape)
    zero = ((jnp.zeros_like(total), jnp.zeros_like(keep)), nothing)
    size, passes_B = rules.size("seq"), sequence.goes_on(segments, size=rules.size("seq"))
    algebra = carry.normalized(empty)
    return carry.incoming((total, keep), state, zero, passes_B, algebra, rules.carry, size)
