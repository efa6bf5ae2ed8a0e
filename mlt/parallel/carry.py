"""`carry`: the state of a recurrence across sequence shards.

A shard of a linear recurrence is an affine map of the state that enters it: S_out = A S_in + B, where B is what the shard
makes of zero. A document that starts inside the shard makes A zero, one that does not go on behind it makes both zero; so
only what really crosses a border crosses it. The states that enter all shards are the prefix of these maps, and bytes
moved do not depend on the length of the sequence. Three ways to compute the prefix (same result beyond rounding):

    gather     every shard gets all maps and folds those in front of it; one all-gather (LASP-2, arXiv 2502.07563)
    permute    log2(shards) rounds that double the reach, each one composing maps
    ring       the state itself travels, in blocks, so that shards work like a pipeline (ZeCO, arXiv 2507.01004)
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from mlt_kernels.linear_recurrence import NormalizedState

from mlt.parallel import sequence

Exchange = Literal["gather", "permute", "ring"]
EXCHANGES: tuple[Exchange, ...] = ("gather", "permute", "ring")


@dataclasses.dataclass(frozen=True)
class Algebra:
    """How the affine maps of one recurrence act.

    Attributes:
        act: (A, S) -> A S.
        add: (S, S') -> S + S'.
        chain: (later A, earlier A) -> their product.
        blocked: which leaves of (A, S) carry the state's last dim and can be cut along it: (False, True) for a matrix
            state, (True, True) for a diagonal one; None if it cannot be cut.
    """

    act: Callable[[Any, Any], Any]
    add: Callable[[Any, Any], Any]
    chain: Callable[[Any, Any], Any]
    blocked: tuple[bool, bool] | None


def _add(left: Array, right: Array) -> Array:
    return left + right


def _lift(a: Array, like: Array) -> Array:
    return a.reshape(*a.shape, *[1] * (like.ndim - a.ndim))


DIAGONAL = Algebra(act=lambda a, s: a * s, add=_add, chain=lambda later, earlier: later * earlier, blocked=(True, True))
"""A has the state's shape."""

SCALED = Algebra(act=lambda a, s: _lift(a, s) * s, add=_add, chain=lambda later, earlier: later * earlier, blocked=(False, True))
"""A (B, H) or (B, H, K) times rows of a state (B, H, K, V)."""

MATRIX = Algebra(
    act=lambda a, s: jnp.einsum("bhij,bhjv->bhiv", a, s, precision=jax.lax.Precision.HIGHEST),
    add=_add,
    chain=lambda later, earlier: jnp.einsum("bhij,bhjk->bhik", later, earlier, precision=jax.lax.Precision.HIGHEST),
    blocked=(False, True),
)
"""A (B, H, K, K) on a state (B, H, K, V)."""


def normalized(empty: float) -> Algebra:
    """States with a running scale: A is (log decay, whether anything passes), both (B, H).

    Args:
        empty: log scale of an empty state.
    """

    def act(a: tuple[Array, Array], s: NormalizedState) -> NormalizedState:
        log_decay, keep = a
        return NormalizedState(
            jnp.where(_lift(keep, s.value), s.value, 0.0),
            jnp.where(_lift(keep, s.key_sum), s.key_sum, 0.0),
            jnp.where(keep, s.log_scale + log_decay, empty),
        )

    def add(left: NormalizedState, right: NormalizedState) -> NormalizedState:
        # Any common scale gives the same state; as a constant it keeps the gradients free of noise.
        scale = jax.lax.stop_gradient(jnp.maximum(jnp.maximum(left.log_scale, right.log_scale), empty))
        weights = [jnp.exp(x.log_scale - scale) for x in (left, right)]
        value, key_sum = (
            _lift(weights[0], a) * a + _lift(weights[1], b) * b
            for a, b in ((left.value, right.value), (left.key_sum, right.key_sum))
        )
        return NormalizedState(value, key_sum, scale)

    def chain(later: tuple[Array, Array], earlier: tuple[Array, Array]) -> tuple[Array, Array]:
        return later[0] + earlier[0], later[1] & earlier[1]

    return Algebra(act=act, add=add, chain=chain, blocked=None)


def incoming(transition: Any, state: Any, zero: tuple[Any, Any], passes_B: Array, algebra: Algebra, how: str, size: int) -> Any:
    """State that enters this shard.

    Args:
        transition, state: the shard's A and B.
        zero: the A and B of a shard that nothing leaves.
        passes_B: whether the shard's last document goes on behind it; where not, nothing leaves the shard.
        algebra: how A and B act.
        how: one of `EXCHANGES`.
        size: number of shards.
    """

    def leaving(x: Array, empty: Array) -> Array:
        return jnp.where(_lift(passes_B, x), x, empty)

    element = jax.tree.map(leaving, (transition, state), zero)
    return {"gather": _gather, "permute": _permute, "ring": _ring}[how](element, zero, algebra, size)


def _apply(element: tuple[Any, Any], state: Any, algebra: Algebra) -> Any:
    return algebra.add(algebra.act(element[0], state), element[1])


def _gather(element, zero, algebra, size):
    every = jax.tree.map(lambda x: jax.lax.all_gather(x, sequence.AXIS), element)
    here = sequence.index()

    def fold(state, numbered):
        shard, one = numbered
        after = _apply(one, state, algebra)
        return jax.tree.map(lambda new, old: jnp.where(shard < here, new, old), after, state), None

    front = jax.tree.map(lambda x: x[: size - 1], every)
    return jax.lax.scan(fold, zero[1], (jnp.arange(size - 1), front))[0]


def _from_left(element, zero, steps, size):
    has_source = sequence.index() >= steps
    moved = sequence.shift(element, steps, size)
    return jax.tree.map(lambda x, empty: jnp.where(has_source, x, empty), moved, zero)


def _permute(element, zero, algebra, size):
    # Moved by one first: a shard wants the maps in front of it, without its own.
    element, steps = _from_left(element, zero, 1, size), 1
    while steps < size - 1:
        other = _from_left(element, zero, steps, size)
        element = (algebra.chain(element[0], other[0]), _apply(element, other[1], algebra))
        steps *= 2
    return element[1]


def _ring(element, zero, algebra, size):
    last = jax.tree.leaves(zero[1])[0].shape[-1]
    count = math.gcd(last, size) if algebra.blocked else 1
    cuts = algebra.blocked or (False, False)

    def cut(x: Array) -> Array:
        """(blocks, ..., last / blocks)"""
        return jnp.moveaxis(x.reshape(*x.shape[:-1], count, -1), -2, 0)

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, -2).reshape(*x.shape[1:-1], -1)

    if not algebra.blocked:
        parts = jax.tree.map(lambda x: x[None], (element, zero[1]))
    else:
        parts = tuple(
            jax.tree.map(cut, x) if blocked else x for x, blocked in zip((*element, zero[1]), (*cuts, True), strict=True)
        )
        parts = (parts[:2], parts[2])
    (transition, state), empty = parts
    here = sequence.index()

    def at(x: Any, block: Array, stacked: bool) -> Any:
        if not stacked:
            return x
        return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, block, keepdims=False), x)

    def tick(carry, t):
        entered, arriving = carry
        # At tick t shard d works on block t - d, which the shard to its left sent one tick ago.
        block = t - here
        mine = (block >= 0) & (block < count)
        block = jnp.clip(block, 0, count - 1)

        def store(all_blocks: Array, new: Array) -> Array:
            kept = jax.lax.dynamic_index_in_dim(all_blocks, block, keepdims=False)
            return jax.lax.dynamic_update_index_in_dim(all_blocks, jnp.where(mine, new, kept), block, 0)

        entered = jax.tree.map(store, entered, arriving)
        stacked = (cuts[0] or not algebra.blocked, True)
        one = (at(transition, block, stacked[0]), at(state, block, True))
        leaving = _apply(one, arriving, algebra)
        return (entered, _from_left(leaving, at(empty, 0, True), 1, size)), None

    first = at(empty, 0, True)
    (entered, _), _ = jax.lax.scan(tick, (empty, first), jnp.arange(size + count - 1))
    return jax.tree.map(join if algebra.blocked else (lambda x: x[0]), entered)
