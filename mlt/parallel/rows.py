"""The gradient of a table as rows: merged on each device, brought together at the owners, never of the table's size.

A device merges its records (`taps.py`) into distinct rows. They reach their owners in rounds of a fixed size: in a round every
device sends an owner its next rows up to a row number on which all devices agree, so that a row that is served is complete,
whoever read it. What an owner does with complete rows (their norm, an optimizer's update in place) is given by the caller; it
may be anything, since no row is served twice.

Letters: U distinct rows of a device, O owners, C rows for one owner in one round, R rows of an owner in one round.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mlt.parallel import table
from mlt.parallel.local import TOKENS, local
from mlt.parallel.rules import LOGICAL_TO_MESH, Rules
from mlt.parallel.table import AXES, CAPACITY
from mlt.parallel.taps import Tap, rows_of

_LAST = jnp.iinfo(jnp.int32).max
_BY_DEVICE = (*TOKENS, None)

Serve = Callable[[Any, jax.Array, jax.Array], Any]
"""(carry, rows (R,) int32 in order, their gradients (R, V)) -> carry. A row id behind the table stands for none."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowGradient:
    """Distinct rows of each device, sorted by (owner, row among the owner's); arrays over (batch shards, sequence shards).

    Attributes:
        owner: (b, s, U) int32; the number of owners for none.
        row: (b, s, U) int32; rows of a stacked table are counted through the layers.
        values: (b, s, U, V) float32.
        shape: of the table, (M, V) or (L, M, V).
        rules: layout.
    """

    owner: jax.Array
    row: jax.Array
    values: jax.Array
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    rules: Rules = dataclasses.field(metadata={"static": True})

    def scaled(self, factor: jax.Array) -> "RowGradient":
        return dataclasses.replace(self, values=self.values * factor)

    def only_if(self, accepted: jax.Array) -> "RowGradient":
        """The same, or no rows at all."""
        owner = jnp.where(accepted, self.owner, self.rules.size("memory"))
        return dataclasses.replace(self, owner=owner)

    def norm_squared(self) -> jax.Array:
        """Sum of squares of the merged gradient: exactly that of the dense one."""
        add = lambda total, _, rows_RV: total + jnp.sum(jnp.square(rows_RV))  # noqa: E731

        def run(owner, row, values):
            total = self._rounds(owner, row, values, add, jnp.zeros((), jnp.float32))
            return jax.lax.psum(total, AXES) if self.rules.size("memory") > 1 else total

        return self._locally(run, (), ())()

    def apply(self, arrays: Any, axes: Any, update: Callable[..., Any], *others: jax.Array) -> Any:
        """The arrays with `update(rows of each, gradient rows (R, V), *others)` in the place of the rows that were read.

        Args:
            arrays: tree of arrays whose dims begin like the table's: (M, ...) or (L, M, ...).
            axes: a like tree of their logical axes.
            others: scalars.
        """
        leaves, treedef = jax.tree.flatten(arrays)
        axes = tuple(treedef.flatten_up_to(axes))
        lead = len(self.shape) - 1

        def run(owner, row, values, *arguments):
            own, others = arguments[: len(leaves)], arguments[len(leaves) :]

            def serve(flat, ids, grad_RV):
                old = treedef.unflatten([x.at[ids].get(mode="fill", fill_value=0) for x in flat])
                new = jax.tree.leaves(update(old, grad_RV, *others))
                put = {"mode": "drop", "unique_indices": True, "indices_are_sorted": True}
                return [x.at[ids].set(rows.astype(x.dtype), **put) for x, rows in zip(flat, new, strict=True)]

            flat = [x.reshape(-1, *x.shape[lead:]) for x in own]
            done = self._rounds(owner, row, values, serve, flat)
            return tuple(x.reshape(like.shape) for x, like in zip(done, own, strict=True))

        inputs = (*axes, *(() for _ in others))
        return treedef.unflatten(self._locally(run, inputs, axes)(*leaves, *others))

    def dense(self) -> jax.Array:
        """The whole gradient, for tests and proofs."""
        axes = ("memory", None) if len(self.shape) == 2 else ("layers", "memory", None)
        zeros = self.rules.constrain(jnp.zeros(self.shape, self.values.dtype), axes)
        return self.apply([zeros], [axes], lambda _, grad_RV: [grad_RV])[0]

    def _locally(self, run, inputs, output):
        mapped = local(run, self.rules, (_BY_DEVICE, _BY_DEVICE, (*_BY_DEVICE, None), *inputs), output)
        return lambda *arguments: mapped(self.owner, self.row, self.values, *arguments)

    def _rounds(self, owner, row, values, serve: Serve, carry: Any) -> Any:
        owner_U, row_U, rows_UV = owner.reshape(-1), row.reshape(-1), values.reshape(-1, values.shape[-1])
        owners = self.rules.size("memory")
        layers = self.shape[0] if len(self.shape) == 3 else 1
        behind = layers * self.shape[-2] // owners
        if owners == 1 and not _others(self.rules):
            return serve(carry, jnp.where(owner_U == 0, row_U, behind), rows_UV)
        size = row_U.shape[0]
        room = min(size, math.ceil(CAPACITY * size / owners))
        start_O = jnp.searchsorted(owner_U, jnp.arange(owners + 1, dtype=jnp.int32)).astype(jnp.int32)
        end_O = start_O[1:]

        def one_round(state):
            next_O, _, carry = state
            at_OC = next_O[:, None] + jnp.arange(room, dtype=jnp.int32)
            row_OC = jnp.where(at_OC < end_O[:, None], row_U[jnp.minimum(at_OC, size - 1)], _LAST)
            after_O = next_O + room
            bound_O = jnp.where(after_O < end_O, row_U[jnp.minimum(after_O, size - 1)], _LAST)
            bound_O = jax.lax.pmin(bound_O, _axes(self.rules))
            sent_OC = row_OC < bound_O[:, None]
            ids, rows = jnp.where(sent_OC, row_OC, _LAST), table.rows_or_zero(rows_UV, jnp.where(sent_OC, at_OC, -1))
            if owners > 1:
                swap = lambda x: jax.lax.all_to_all(x, AXES, split_axis=0, concat_axis=0, tiled=True)  # noqa: E731
                ids, rows = swap(ids), swap(rows)
            if _others(self.rules):
                ids, rows = (jax.lax.all_gather(x, _others(self.rules), axis=0, tiled=True) for x in (ids, rows))
            carry = serve(carry, *_complete(ids.reshape(-1), rows.reshape(-1, rows.shape[-1]), behind))
            next_O = next_O + jnp.sum(sent_OC, axis=1, dtype=jnp.int32)
            more = jax.lax.pmax(jnp.any(next_O < end_O).astype(jnp.int32), _axes(self.rules))
            return next_O, more, carry

        state = (start_O[:-1], jnp.ones((), jnp.int32), carry)
        if room == size:
            return one_round(state)[2]
        return jax.lax.while_loop(lambda state: state[1] > 0, one_round, state)[2]


def merge(taps: Any, shape: tuple[int, ...], rules: Rules) -> RowGradient:
    """The records of every lookup of one table in one step, equal rows summed in float32 on each device.

    Args:
        taps: a tree of records; in front of the dims of a call they have those of micro-batches, and of layers that a scan
            stacks: for a stacked table, its own.
        shape: of the table, (M, V) or (L, M, V).
    """
    stacked = len(shape) == 3
    owners = rules.size("memory")
    own = shape[-2] // owners
    behind = own * (shape[0] if stacked else 1)
    if behind > table.MOST_LOCAL_ROWS:
        rule = f"{behind} rows of one stacked table on a device; at most {table.MOST_LOCAL_ROWS} can be addressed"
        raise ValueError(f"{rule}: use more fsdp shards")
    records = jax.tree.leaves(taps, is_leaf=_is_tap)
    leaves, treedef = jax.tree.flatten(records)
    axes = lambda call, x: (*(None,) * _lead(call), *TOKENS, *(None,) * (x.ndim - _lead(call) - 2))  # noqa: E731
    inputs = tuple(axes(call, x) for call in records for x in jax.tree.leaves(call))

    def run(*leaves):
        calls = jax.tree.unflatten(treedef, leaves)
        places = [_address(rows_of(call.words), _lead(call), stacked, owners, own) for call in calls]
        owner_N, row_N = (jnp.concatenate([part.reshape(-1) for part in parts]) for parts in zip(*places, strict=True))
        size = max(min(row_N.size, owners * behind), 1)
        found = table.distinct(owner_N, row_N, owners, size)
        total_UV, first = jnp.zeros((size, shape[-1]), jnp.float32), 0
        for call, (owner, _) in zip(calls, places, strict=True):
            at = found.inverse_N[first : first + owner.size].reshape(-1, owner.shape[-1])
            total_UV = _add(total_UV, jnp.where(at >= 0, at, size), call)
            first += owner.size
        alone = lambda x: x[None, None]  # noqa: E731
        return alone(found.owner_U), alone(found.local_U), alone(total_UV)

    output = (_BY_DEVICE, _BY_DEVICE, (*_BY_DEVICE, None))
    return RowGradient(*local(run, rules, inputs, output)(*leaves), shape, rules)


def _is_tap(node: Any) -> bool:
    return isinstance(node, Tap)


def _lead(call: Tap) -> int:
    """Dims in front of (B, T, K, words)."""
    return call.words.ndim - 4


def _address(rows: Any, lead: int, stacked: bool, owners: int, own: int) -> tuple[jax.Array, jax.Array]:
    owner, row = table.owner_of(rows, owners, own)
    if not stacked:
        return owner, row
    layer = jax.lax.broadcasted_iota(jnp.int32, row.shape, lead - 1)
    return owner, row + layer * own


def _add(total_UV: jax.Array, at_XK: jax.Array, call: Tap) -> jax.Array:
    """The records of a call added to the rows they belong to, slot by slot: the rows of all slots never exist at once."""
    if call.coefficients is None:
        vectors = call.vectors.reshape(-1, total_UV.shape[1]).astype(total_UV.dtype)
        return total_UV.at[at_XK.reshape(-1)].add(vectors, mode="drop")
    vectors_XV = call.vectors.reshape(-1, total_UV.shape[1]).astype(total_UV.dtype)
    coefficients_XK = call.coefficients.reshape(at_XK.shape).astype(total_UV.dtype)

    def slot(total_UV, xs):
        at_X, coefficient_X = xs
        return total_UV.at[at_X].add(coefficient_X[:, None] * vectors_XV, mode="drop"), None

    return jax.lax.scan(slot, total_UV, (at_XK.T, coefficients_XK.T))[0]


def _complete(ids: jax.Array, rows: jax.Array, behind: int) -> tuple[jax.Array, jax.Array]:
    """Equal rows of several devices summed, in the order of the devices; (ids in order, then `behind` for none; sums)."""
    size = min(ids.shape[0], behind)
    found = table.distinct(jnp.where(ids == _LAST, 1, 0), ids, 1, size)
    at = jnp.where(found.inverse_N >= 0, found.inverse_N, size)
    sums = jnp.zeros((size, rows.shape[-1]), rows.dtype).at[at].add(rows, mode="drop")
    return jnp.where(found.owner_U == 0, found.local_U, behind), sums


def _axes(rules: Rules) -> tuple[str, ...]:
    """Mesh axes over which tokens are split."""
    return (*LOGICAL_TO_MESH["batch"], *LOGICAL_TO_MESH["seq"])


def _others(rules: Rules) -> tuple[str, ...]:
    """Those of them over which a table is copied."""
    if rules.mesh is None:
        return ()
    return tuple(axis for axis in _axes(rules) if axis not in AXES and rules.mesh.shape[axis] > 1)
