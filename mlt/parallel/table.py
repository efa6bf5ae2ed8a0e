"""A table whose rows lie with owner devices: who owns a row, and how rows travel to the tokens that read them.

A table (M, V), or (L, M, V) stacked over layers, is split by rows over the `memory` shards as any array is: shard d of n
owns rows d M/n to (d + 1) M/n - 1, so that a checkpoint holds it in row order and any number of owners restores it. A row is
addressed as (owner, local row), two int32, whatever M is.

A device first merges equal ids, then asks each owner for its distinct rows in a buffer of fixed size by all-to-all. What does
not fit waits for a further round, so no capacity loses a row. Gradients of rows travel back the same way.

Letters: N ids of a device, U distinct ones, O owners, C rows of one owner in one round; others as in row_lookup.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from mlt.parallel.rules import LOGICAL_TO_MESH, Rules

Strategy = Literal["reduce", "exchange"]
STRATEGIES: tuple[Strategy, ...] = ("reduce", "exchange")

AXES = LOGICAL_TO_MESH["memory"]
CAPACITY = 1.25
"""Rows that an owner takes from each device in one round, as a multiple of an even share of its distinct ids: with equal ids
merged, the fullest of 256 owners of a hashed table got 1.15 of it."""
MOST_LOCAL_ROWS = 2**31 - 1


class WideRows(NamedTuple):
    """Row ids beyond int32: `high * 2^32 + low`. A negative `high` stands for no row.

    Attributes:
        high: (...) int32.
        low: (...) uint32.
    """

    high: jax.Array
    low: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.high.shape

    def reshape(self, *shape: int) -> "WideRows":
        return WideRows(self.high.reshape(*shape), self.low.reshape(*shape))


def split_rows(ids: Any) -> WideRows:
    """int64 ids, of NumPy or inside `jax.enable_x64`, as words."""
    return WideRows((ids >> 32).astype("int32"), (ids & 0xFFFFFFFF).astype("uint32"))


ROWS_FIELD = "rows/"
"""Fields of a batch that hold rows are called this and the layer's name; of words, also `/high` or `/low`."""


def row_fields(name: str, rows: Any) -> dict[str, Any]:
    """Rows as fields of a batch: a pair of words is two."""
    if isinstance(rows, tuple):
        return {f"{ROWS_FIELD}{name}/high": rows[0], f"{ROWS_FIELD}{name}/low": rows[1]}
    return {f"{ROWS_FIELD}{name}": rows}


def rows_in(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Rows by the layer's name, from the fields of a batch."""
    found: dict[str, Any] = {}
    for field, array in batch.items():
        if field.startswith(ROWS_FIELD):
            name, _, part = field.removeprefix(ROWS_FIELD).partition("/")
            if not part:
                found[name] = array
            elif part == "high":
                found[name] = WideRows(array, batch[f"{ROWS_FIELD}{name}/low"])
    return found


def row_ids(rows: jax.Array | WideRows, num_rows: int) -> jax.Array | WideRows:
    """Ids as an op takes them: int32 for a table they fit in."""
    return _joined(rows) if isinstance(rows, WideRows) and num_rows <= MOST_LOCAL_ROWS else rows


def owner_of(rows: jax.Array | WideRows, owners: int, own: int) -> tuple[jax.Array, jax.Array]:
    """(owner, row among the owner's) of row ids, int32; an id outside [0, owners * own) has owner `owners`.

    Args:
        owners: shards of the table.
        own: rows of each.
    """
    if own > MOST_LOCAL_ROWS:
        raise ValueError(f"a table shard has {own} rows; at most {MOST_LOCAL_ROWS} fit on a device, so use more fsdp shards")
    if not isinstance(rows, WideRows):
        known = (rows >= 0) & (rows < min(owners * own, MOST_LOCAL_ROWS + 1)) if owners * own <= MOST_LOCAL_ROWS else rows >= 0
        owner = jnp.where(known, rows // own, owners)
        return owner.astype(jnp.int32), jnp.where(known, rows % own, 0).astype(jnp.int32)
    with jax.enable_x64(True):
        ids = (rows.high.astype(jnp.int64) << 32) | rows.low.astype(jnp.int64)
        known = (ids >= 0) & (ids < owners * own)
        ids = jnp.where(known, ids, 0)
        owner = jnp.where(known, jax.lax.div(ids, jnp.int64(own)), owners)
        return owner.astype(jnp.int32), jax.lax.rem(ids, jnp.int64(own)).astype(jnp.int32)


def _joined(rows: WideRows) -> jax.Array:
    """Words as int32 ids; -1 where they do not fit."""
    fits = (rows.high == 0) & (rows.low <= MOST_LOCAL_ROWS)
    return jnp.where(fits, rows.low.astype(jnp.int32), -1)


def sent_bytes(strategy: Strategy, *, tokens: int, slots: int, width: int, rows: int, shards: int, pooled: bool) -> float:
    """Bytes of float32 rows and ids that one device receives in one lookup.

    Args:
        tokens: of one device.
        slots: rows that a token reads.
        width: of a row.
        rows: of the whole table.
        shards: owners.
        pooled: a token's rows are summed with weights.
    """
    ids = tokens * slots
    if strategy == "reduce":
        return 4.0 * (shards - 1) * (ids * (2 if pooled else 1) + (tokens if pooled else ids) * width)
    return 4.0 * CAPACITY * min(ids, rows) * (1 + width) * (shards - 1) / shards


def choose(**shape: Any) -> Strategy:
    """What receives less; arguments of `sent_bytes`."""
    return min(STRATEGIES, key=lambda strategy: sent_bytes(strategy, **shape))


class Distinct(NamedTuple):
    """The distinct rows of a device's ids, sorted by (owner, local row).

    Attributes:
        owner_U: owner of each; the number of owners behind the last.
        local_U: its row there.
        start_O: first of each owner, and behind the last one the number of distinct rows (O + 1,).
        inverse_N: which of them each id is; -1 for none.
    """

    owner_U: jax.Array
    local_U: jax.Array
    start_O: jax.Array
    inverse_N: jax.Array


def distinct(owner_N: jax.Array, local_N: jax.Array, owners: int, size: int) -> Distinct:
    """Merge equal ids.

    Args:
        size: room for distinct rows (U); at least as many as there can be.
    """
    number_N = jnp.arange(owner_N.shape[0], dtype=jnp.int32)
    owner_N, local_N, source_N = jax.lax.sort((owner_N, local_N, number_N), num_keys=2)
    real_N = owner_N < owners
    differs_N = (owner_N[1:] != owner_N[:-1]) | (local_N[1:] != local_N[:-1])
    new_N = real_N & jnp.concatenate([jnp.ones(1, bool), differs_N])[: owner_N.shape[0]]
    rank_N = jnp.cumsum(new_N, dtype=jnp.int32) - 1
    inverse_N = jnp.zeros_like(rank_N).at[source_N].set(jnp.where(real_N, rank_N, -1), unique_indices=True)
    at_N = jnp.where(new_N, rank_N, size)
    owner_U = jnp.full((size,), owners, jnp.int32).at[at_N].set(owner_N, mode="drop")
    local_U = jnp.zeros((size,), jnp.int32).at[at_N].set(local_N, mode="drop")
    start_O = jnp.searchsorted(owner_U, jnp.arange(owners + 1, dtype=jnp.int32)).astype(jnp.int32)
    return Distinct(owner_U, local_U, start_O, inverse_N)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """How distinct rows travel between a device and the owners.

    Attributes:
        owners: shards of the table.
        room: rows for each owner in one round (C).
        axes: all axes of the mesh, over which devices agree on the number of rounds.
    """

    owners: int
    room: int
    axes: tuple[str, ...]

    @classmethod
    def of(cls, rules: Rules, size: int, capacity: float | None) -> "Exchange":
        owners = rules.size("memory")
        room = size if capacity is None else min(size, math.ceil(capacity * size / owners))
        return cls(owners, max(room, 1), tuple(rules.mesh.axis_names))

    def rounds(self, start_O: jax.Array) -> jax.Array:
        """Rounds until every device has been served, the same number on all."""
        most = jax.lax.pmax(jnp.max(jnp.diff(start_O)), self.axes)
        return -(-most // self.room)

    def waiting(self, start_O: jax.Array) -> jax.Array:
        """Rows of this device that do not fit in the first round."""
        return jnp.sum(jnp.maximum(jnp.diff(start_O) - self.room, 0))

    def swap(self, x: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(x, AXES, split_axis=0, concat_axis=0, tiled=True)

    def window(self, start_O: jax.Array, index: Any) -> jax.Array:
        """(O, C) places among the distinct rows that travel in one round; -1 for none."""
        at_OC = start_O[:-1, None] + index * self.room + jnp.arange(self.room, dtype=jnp.int32)
        return jnp.where(at_OC < start_O[1:, None], at_OC, -1)

    def loop(self, found: Distinct, body: Any, carry: Any) -> Any:
        """`carry = body(index, carry)` for every round."""
        if self.room >= found.owner_U.shape[0]:
            return body(0, carry)
        return jax.lax.fori_loop(0, self.rounds(found.start_O), body, carry)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def fetch(table_MV: jax.Array, found: Distinct, how: Exchange) -> jax.Array:
    """(U, V) rows from their owners; zeros behind the last. The gradient is summed at the owners."""
    nth_U = jnp.arange(found.owner_U.shape[0], dtype=jnp.int32) - found.start_O[found.owner_U.clip(0, how.owners - 1)]
    slot_U = jnp.where(found.owner_U < how.owners, found.owner_U * how.room + nth_U % how.room, 0)
    round_U = jnp.where(found.owner_U < how.owners, nth_U // how.room, -1)

    def body(index: Any, rows_UV: jax.Array) -> jax.Array:
        at_OC = how.window(found.start_O, index)
        wanted_OC = how.swap(jnp.where(at_OC >= 0, found.local_U[at_OC], -1))
        back = how.swap(rows_or_zero(table_MV, wanted_OC))
        return jnp.where((round_U == index)[:, None], back.reshape(-1, table_MV.shape[1])[slot_U], rows_UV)

    return how.loop(found, body, jnp.zeros((found.owner_U.shape[0], table_MV.shape[1]), table_MV.dtype))


def _fetch_fwd(table_MV, found, how):
    return fetch(table_MV, found, how), (table_MV, found)


def _fetch_bwd(how, residuals, grad_UV):
    table_MV, found = residuals

    def body(index: Any, total_MV: jax.Array) -> jax.Array:
        at_OC = how.window(found.start_O, index)
        wanted_OC = how.swap(jnp.where(at_OC >= 0, found.local_U[at_OC], -1))
        got = how.swap(rows_or_zero(grad_UV, at_OC))
        at = jnp.where(wanted_OC >= 0, wanted_OC, table_MV.shape[0]).reshape(-1)
        return total_MV.at[at].add(got.reshape(at.shape[0], -1), mode="drop")

    total = how.loop(found, body, jnp.zeros(table_MV.shape, jnp.promote_types(grad_UV.dtype, jnp.float32)))
    return total.astype(table_MV.dtype), None


fetch.defvjp(_fetch_fwd, _fetch_bwd)


def rows_or_zero(rows: jax.Array, at: jax.Array) -> jax.Array:
    """Rows by place; zeros where it is negative."""
    taken = rows.at[jnp.maximum(at, 0)].get(mode="promise_in_bounds")
    return jnp.where((at >= 0)[..., None], taken, jnp.zeros((), rows.dtype))
