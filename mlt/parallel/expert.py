"""Tokens to the experts that run them, over the `expert` axis. Nothing is dropped here.

Every device sorts its own (token, slot) pairs by expert. With the experts split, the rows of each owner go to it in a
buffer of fixed size by all-to-all, are sorted there among its experts, and come back the way they went. All moves are
gathers, and so are their gradients: each map between rows knows its inverse.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from mlt.parallel import sequence
from mlt.parallel.local import STREAM, TOKENS, Axes, Whole, local
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
    *,
    capacity: int | None = None,
) -> jax.Array:
    """y = sum over a token's chosen experts of weight * network(x).

    Args:
        network: (rows (R, D) sorted by expert, rows per expert (E,), *kernels) -> (R, D); rows behind the last group are
            padding and must come out as zero. With split hidden units it gives each shard's part of the sum.
        kernels: parameters with experts first, in the type they are kept in; they are cast to that of x.
        kernel_axes: their logical axes; `embed` is gathered.
        x_BTD, experts_BTA, weights_BTA: tokens, the experts each one chose, all different, and the weights of their
            outputs. E, the number of experts, stands for none.
        capacity: how many tokens of a row go to one expert at most, if that is known (`within_capacity`): buffers between
            devices are made for as many, else for the worst case.

    Returns:
        y (B, T, D) in the dtype of x.
    """
    choice = (*TOKENS, None)
    inputs = (STREAM, choice, choice, *(Whole(axes, x_BTD.dtype) for axes in kernel_axes))
    shards = rules.size("experts")

    def run(x, experts, weights, *kernels):
        dims = x.shape
        if x.size == 0:
            return x
        own, kernels = kernels[0].shape[0], tuple(kernel.astype(x.dtype) for kernel in kernels)
        # Rows that one owner may get from here: a token sends it no more than it has slots, and than the owner has experts.
        room = dims[0] * dims[1] * min(experts.shape[-1], own)
        if capacity is not None:
            room = min(room, dims[0] * own * min(dims[1], capacity))
        experts = experts.reshape(-1, experts.shape[-1])
        order_R, sorted_R = _sorted(experts.reshape(-1), own * shards)
        place_NA = _inverse(order_R).reshape(experts.shape)
        rows_RD = _spread(x.reshape(-1, dims[-1]), order_R, place_NA)
        starts = jnp.searchsorted(sorted_R, jnp.arange(own * shards + 1))
        if shards == 1:
            y_RD = network(rows_RD, jnp.diff(starts).astype(jnp.int32), *kernels)
        else:
            y_RD = _over_owners(network, kernels, rows_RD, starts, room, shards)
        y_ND = _combine(y_RD, weights.reshape(experts.shape), order_R, place_NA)
        if rules.size("ffn") > 1:
            y_ND = jax.lax.psum(y_ND, LOGICAL_TO_MESH["ffn"])
        return y_ND.astype(x.dtype).reshape(dims)

    return local(run, rules, inputs, STREAM)(x_BTD, experts_BTA, weights_BTA, *kernels)


def within_capacity(rules: Rules, experts_BTA: jax.Array, is_token_BT: jax.Array, num_experts: int, capacity: int) -> jax.Array:
    """Which (token, expert) pairs are among the first `capacity` of their row and expert, (B, T, A) bool.

    Tokens come in the row's order, so a pair does not depend on later ones, nor on how rows lie over devices.
    """
    shards = rules.size("seq")

    def run(experts, is_token):
        hits_BTE = (experts[..., None] == jnp.arange(num_experts)).any(-2) & is_token[..., None]
        hits_BTE = hits_BTE.astype(jnp.int32)
        before_BTE = jnp.cumsum(hits_BTE, axis=1) - hits_BTE
        if shards > 1:
            loads_SBE = jax.lax.all_gather(hits_BTE.sum(1), sequence.AXIS)
            earlier_S11 = (jnp.arange(shards) < sequence.index())[:, None, None]
            before_BTE += jnp.where(earlier_S11, loads_SBE, 0).sum(0)[:, None]
        return jnp.take_along_axis(before_BTE, experts, axis=-1) < capacity

    choice = (*TOKENS, None)
    return local(run, rules, (choice, TOKENS), choice)(experts_BTA, is_token_BT)


def _over_owners(network, kernels, rows_RD, starts, room, shards):
    """The network on the owners of the experts; y_RD. Each owner gets at most `room` rows from here."""
    own = kernels[0].shape[0]
    first_O, end_O = starts[:-1:own], starts[own::own]
    at_OC = first_O[:, None] + jnp.arange(room)
    at_OC = jnp.where(at_OC < end_O[:, None], at_OC, -1)
    # Where each sorted row stands in the buffer: its owner, and its number among the rows for that owner.
    row_R = jnp.arange(rows_RD.shape[0])
    owner_R = jnp.searchsorted(end_O, row_R, side="right")
    nth_R = row_R - first_O[jnp.minimum(owner_R, shards - 1)]
    slot_R = jnp.where(owner_R < shards, owner_R * room + nth_R, -1)
    # The expert of each buffer row, counted from the owner's first; `own` for an empty one, behind all of them.
    expert_OC = jnp.searchsorted(starts, at_OC, side="right") - 1 - jnp.arange(shards)[:, None] * own
    expert_OC = jnp.where(at_OC >= 0, expert_OC, own)

    def exchange(x):
        return jax.lax.all_to_all(x, AXIS, split_axis=0, concat_axis=0, tiled=True)

    got_MD = exchange(_move(rows_RD, at_OC.reshape(-1), slot_R))
    order_M, sorted_M = _sorted(exchange(expert_OC).reshape(-1), own)
    place_M = _inverse(order_M)
    sizes_E = jnp.diff(jnp.searchsorted(sorted_M, jnp.arange(own + 1))).astype(jnp.int32)
    y_MD = _move(network(_move(got_MD, order_M, place_M), sizes_E, *kernels), place_M, order_M)
    return _move(exchange(y_MD), slot_R, at_OC.reshape(-1))


def _sorted(experts_R: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
    """(which pair stands where, its expert) of the pairs by expert and, within one, in their order; `num_experts` is last."""
    size = experts_R.size
    if (num_experts + 1) * size >= 2**31:
        order_R = jnp.argsort(experts_R, stable=True)
        return order_R, experts_R[order_R]
    # Expert and number in one word: a sort of one array takes a third of the time.
    key_R = jax.lax.sort(experts_R.astype(jnp.int32) * size + jnp.arange(size, dtype=jnp.int32), is_stable=False)
    return key_R % size, key_R // size


def _inverse(order_R: jax.Array) -> jax.Array:
    numbers_R = jnp.arange(order_R.size, dtype=order_R.dtype)
    return jnp.zeros_like(order_R).at[order_R].set(numbers_R, unique_indices=True)


@jax.custom_vjp
def _spread(x_ND: jax.Array, order_R: jax.Array, place_NA: jax.Array) -> jax.Array:
    """Sorted row r is the token of the (token, slot) pair `order_R[r]`; `place_NA` says where each pair went.

    The gradient of a token is the sum over its slots, in their order, in float32: gathers and no scatter.
    """
    return _take(x_ND, order_R // place_NA.shape[1])


def _spread_fwd(x_ND, order_R, place_NA):
    return _spread(x_ND, order_R, place_NA), place_NA


def _spread_bwd(place_NA, grad_RD):
    return sum(_slots(grad_RD, place_NA)).astype(grad_RD.dtype), None, None


_spread.defvjp(_spread_fwd, _spread_bwd)


@jax.custom_vjp
def _combine(y_RD: jax.Array, weights_NA: jax.Array, order_R: jax.Array, place_NA: jax.Array) -> jax.Array:
    """The weighted sum of each token's rows, over its slots in their order, (N, D) float32.

    One slot at a time, forward and backward: on a CPU an (N, A, D) array would cost more than all else here.
    """
    parts = zip(weights_NA.T, _slots(y_RD, place_NA), strict=True)
    return sum(weight_N[:, None] * y_ND for weight_N, y_ND in parts)


def _combine_fwd(y_RD, weights_NA, order_R, place_NA):
    return _combine(y_RD, weights_NA, order_R, place_NA), (y_RD, weights_NA, order_R, place_NA)


def _combine_bwd(saved, grad_ND):
    y_RD, weights_NA, order_R, place_NA = saved
    weight_R = _take(weights_NA.reshape(-1), order_R)
    grad_RD = (weight_R[:, None] * _take(grad_ND, order_R // place_NA.shape[1])).astype(y_RD.dtype)
    grad_NA = jnp.stack([(y_ND * grad_ND).sum(-1) for y_ND in _slots(y_RD, place_NA)], axis=-1)
    return grad_RD, grad_NA.astype(weights_NA.dtype), None, None


_combine.defvjp(_combine_fwd, _combine_bwd)


def _slots(rows_RD: jax.Array, place_NA: jax.Array) -> list[jax.Array]:
    """The rows of every token's first slot, second slot, ..., each (N, D) float32."""
    return [_take(rows_RD, place_N).astype(jnp.float32) for place_N in place_NA.T]


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
