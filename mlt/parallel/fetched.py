"""Feed-forward weights that are fetched for runs of tokens: which runs a shard has, and each run through its own weights.

A run is a stretch of tokens with one id, such as the cluster of a document. A shard has room for S runs of each row: their
weights lie in slots 0 to S - 1, in order, and slot S is that of tokens behind them, which get none. Letters: G = S + 1, U
hidden units.
"""

import jax
import jax.numpy as jnp
import mlt_kernels

from mlt.parallel.local import STREAM, TOKENS, local
from mlt.parallel.rules import Rules

NONE = -2
"""Id of a slot that no run has."""


def runs_of(rules: Rules, ids_BT: jax.Array, is_token_BT: jax.Array, slots: int) -> tuple[jax.Array, jax.Array]:
    """(slot of each token (B, T), id of each slot (B, G) of every sequence shard, one after another; `NONE` for no run).

    Args:
        ids_BT: what makes a run. Padding goes with the run in front of it.
        slots: runs that a row of a shard may have (S).
    """

    def run(ids, is_token):
        real_ids = jnp.where(is_token, ids, NONE)
        # Of padding, the last token's id in front of it.
        place = jnp.where(is_token, jnp.arange(ids.shape[1]), -1)
        last = jax.lax.cummax(place, axis=1)
        before = jnp.concatenate([jnp.full_like(last[:, :1], -1), last[:, :-1]], axis=1)
        known = jnp.where(before >= 0, jnp.take_along_axis(real_ids, jnp.maximum(before, 0), axis=1), NONE)
        begins = is_token & ((before < 0) | (real_ids != known))
        number = jnp.clip(jnp.cumsum(begins, axis=1, dtype=jnp.int32) - 1, 0, slots)
        row = jax.lax.broadcasted_iota(jnp.int32, ids.shape, 0)
        at = jnp.where(begins & (number < slots), number, slots + 1)
        found = jnp.full((ids.shape[0], slots + 1), NONE, jnp.int32).at[row, at].set(ids, mode="drop")
        return number, found

    return local(run, rules, (TOKENS, TOKENS), (TOKENS, TOKENS))(ids_BT, is_token_BT)


def swiglu_of_runs(rules: Rules, x_BTD: jax.Array, slot_BT: jax.Array, units_BGU3: jax.Array) -> jax.Array:
    """W_down (silu(W_gate x) * W_up x) of each token with the weights of its slot, (B, T, D).

    Args:
        slot_BT: not decreasing along the tokens of a shard.
        units_BGU3: (B, G of every sequence shard, U, 3 D): each hidden unit's gate, up and down vectors.
    """

    def run(x, slot, units):
        B, T, D = x.shape
        slots = units.shape[1]
        weights = units.reshape(B * slots, *units.shape[2:])
        gate, up, down = (weights[..., i * D : (i + 1) * D] for i in range(3))
        sizes = (slot[..., None] == jnp.arange(slots)).sum(1, dtype=jnp.int32).reshape(-1)
        rows = x.reshape(B * T, D)
        into = lambda w: mlt_kernels.grouped_matmul(rows, w.swapaxes(1, 2), sizes)  # noqa: E731
        hidden = jax.nn.silu(into(gate)) * into(up)
        return mlt_kernels.grouped_matmul(hidden, down, sizes).reshape(x.shape)

    return local(run, rules, (STREAM, TOKENS, (*TOKENS, None, None)), STREAM)(x_BTD, slot_BT, units_BGU3)
