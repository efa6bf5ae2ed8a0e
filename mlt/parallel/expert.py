"""Tokens to the experts that run them, over the `expert` axis: no token dropped unless a capacity is asked for.

Every device sorts its own (token, slot) pairs by expert. With the experts split, the rows of each owner go to it in a
buffer of fixed size by all-to-all, are sorted there among its experts, and come back the way they went. All moves are
gathers, and so are their gradients: each map between rows knows its inverse.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from mlt.parallel.local import STREAM, TOKENS, Axes, local
from mlt.parallel.rules import LOGICAL_TO_MESH, Rules

Network = Callable[..., jax.Array]

AXIS = "expert"


def run_experts(
    rules: Rules,
    network: Network,
    kernels: Sequence[jax.Array],
    kernel_axes: Sequence[Axes],
    x_BTD: jax.Array,
    experts_BTA: jax.Array,
    weights_BTA: jax.Array,
    is_token_BT: jax.Array,
    *,
    capacity_factor: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """y = sum over a token's chosen experts of weight * network(x), and how many (token, expert) pairs were dropped.

    Args:
        network: (rows (R, D) sorted by expert, rows per expert (E,), *kernels) -> (R, D); rows behind the last group are
            padding and must come out as zero. With split hidden units it gives each shard's part of the sum.
        kernels: parameters with experts first.
        kernel_axes: their logical axes inside; a dim that is split over `fsdp` is gathered.
        x_BTD, experts_BTA, weights_BTA: tokens, the experts each one chose, and the weights of their outputs.
        is_token_BT: False at padding, which goes nowhere.
        capacity_factor: rows that an expert shard takes from each device, as a multiple of an even share. None makes room
            for the worst case. With a factor, what a document computes may depend on its neighbours.

    Returns:
        y (B, T, D) in the dtype of x, and the dropped pairs, () int32.
    """
    choice = (*TOKENS, None)
    inputs = (STREAM, choice, choice, TOKENS, *kernel_axes)

    def run(x, experts, weights, is_token, *kernels):
        dims = x.shape
        if x.size == 0:
            return x, jnp.zeros((), jnp.int32)
        E = kernels[0].shape[0] * rules.size("experts")
        experts = jnp.where(is_token[..., None], experts, E).reshape(-1, experts.shape[-1])
        order_R = jnp.argsort(experts.reshape(-1), stable=True)
        place_R = _inverse(order_R)
        rows_RD = _spread(x.reshape(-1, dims[-1]), order_R, place_R.reshape(experts.shape))
        starts = jnp.searchsorted(experts.reshape(-1)[order_R], jnp.arange(E + 1))
        if rules.size("experts") == 1:
            y_RD, dropped = network(rows_RD, jnp.diff(starts).astype(jnp.int32), *kernels), jnp.zeros((), jnp.int32)
        else:
            y_RD, dropped = _over_owners(network, kernels, rows_RD, starts, experts.shape, capacity_factor, rules.size("experts"))
        y_NAD = _move(y_RD, place_R, order_R).reshape(*experts.shape, dims[-1])
        y_ND = (y_NAD.astype(jnp.float32) * weights.reshape(*experts.shape, 1)).sum(1)
        if rules.size("ffn") > 1:
            y_ND = jax.lax.psum(y_ND, LOGICAL_TO_MESH["ffn"])
        if rules.mesh is not None and rules.mesh.size > 1:
            dropped = jax.lax.psum(dropped, (*LOGICAL_TO_MESH["batch"], *LOGICAL_TO_MESH["seq"]))
        return y_ND.astype(x.dtype).reshape(dims), dropped

    return local(run, rules, inputs, (STREAM, ()))(x_BTD, experts_BTA, weights_BTA, is_token_BT, *kernels)


def _over_owners(network, kernels, rows_RD, starts, shape, capacity_factor, shards):
    """The network on the owners of the experts; (y_RD, dropped pairs)."""
    tokens, slots = shape
    own = kernels[0].shape[0]
    room = tokens * min(slots, own)
    if capacity_factor is not None:
        room = min(room, math.ceil(capacity_factor * tokens * slots / shards))
    first_O, end_O = starts[:-1:own], starts[own::own]
    at_OC = first_O[:, None] + jnp.arange(room)
    at_OC = jnp.where(at_OC < end_O[:, None], at_OC, -1)
    # Where each sorted row stands in the buffer: its owner, and its number among the rows for that owner.
    row_R = jnp.arange(rows_RD.shape[0])
    owner_R = jnp.searchsorted(end_O, row_R, side="right")
    nth_R = row_R - first_O[jnp.minimum(owner_R, shards - 1)]
    sent_R = (owner_R < shards) & (nth_R < room)
    slot_R = jnp.where(sent_R, owner_R * room + nth_R, -1)
    dropped = jnp.sum((owner_R < shards) & ~sent_R, dtype=jnp.int32)
    # The expert of each buffer row, counted from the owner's first; `own` for an empty one, behind all of them.
    expert_OC = jnp.searchsorted(starts, at_OC, side="right") - 1 - jnp.arange(shards)[:, None] * own
    expert_OC = jnp.where(at_OC >= 0, expert_OC, own)

    def exchange(x):
        return jax.lax.all_to_all(x, AXIS, split_axis=0, concat_axis=0, tiled=True)

    got_MD = exchange(_move(rows_RD, at_OC.reshape(-1), slot_R))
    expert_M = exchange(expert_OC).reshape(-1)
    order_M = jnp.argsort(expert_M, stable=True)
    place_M = _inverse(order_M)
    sizes_E = jnp.diff(jnp.searchsorted(expert_M[order_M], jnp.arange(own + 1))).astype(jnp.int32)
    y_MD = _move(network(_move(got_MD, order_M, place_M), sizes_E, *kernels), place_M, order_M)
    return _move(exchange(y_MD), slot_R, at_OC.reshape(-1)), dropped


def _inverse(order_R: jax.Array) -> jax.Array:
    numbers_R = jnp.arange(order_R.size, dtype=order_R.dtype)
    return jnp.zeros_like(order_R).at[order_R].set(numbers_R, unique_indices=True)


@jax.custom_vjp
def _spread(x_ND: jax.Array, order_R: jax.Array, place_NA: jax.Array) -> jax.Array:
    """Sorted row r is the token of the (token, slot) pair `order_R[r]`; `place_NA` says where each pair went.

    The gradient of a token is the sum over its slots, in their order, in float32: another gather and no scatter.
    """
    return _take(x_ND, order_R // place_NA.shape[1])


def _spread_fwd(x_ND, order_R, place_NA):
    return _spread(x_ND, order_R, place_NA), place_NA


def _spread_bwd(place_NA, grad_RD):
    return _take(grad_RD, place_NA).astype(jnp.float32).sum(1).astype(grad_RD.dtype), None, None


_spread.defvjp(_spread_fwd, _spread_bwd)


@jax.custom_vjp
def _move(x: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
    """Row i of the result is x[source[i]], zero where that is negative; row j of x went to target[j], if not negative."""
    return _take_or_zero(x, source)


def _move_fwd(x, source, target):
    return _take_or_zero(x, source), target


def _move_bwd(target, grad):
    return _take_or_zero(grad, target), None, None


_move.defvjp(_move_fwd, _move_bwd)


def _take(rows: jax.Array, at: jax.Array) -> jax.Array:
    return rows.at[at].get(mode="promise_in_bounds")


def _take_or_zero(rows: jax.Array, at: jax.Array) -> jax.Array:
    return jnp.where((at >= 0)[:, None], _take(rows, jnp.maximum(at, 0)), jnp.zeros((), rows.dtype))
