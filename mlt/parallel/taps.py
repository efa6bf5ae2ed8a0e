"""Gradients of tables that never take a table's size: what a lookup read, and what came back to it.

The gradient of a lookup is a sum over its tokens and slots, `coefficient * vector` added to the row that was read. For a
table whose optimizer works by rows, a `TapedTable` stands in the module where the array was. It reads the array as a constant,
and each lookup passes its result through a *tap*: an extra input of zeros whose cotangent is defined to be the record of the
call. Differentiating the loss by the taps hence gives ids, coefficients and vectors, stacked over scanned layers as parameters
are, through rematerialization and micro-batches, and no mixer need know.

A table that several layers read has taps of its own for every *place* that reads it (`reading`): records are no sums, and the
cotangent of one tap that two layers used would be one. In a scan they are scanned over beside the layers.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mlt.parallel.table import WideRows

WORD = 16
"""An id plus one travels as float32 words of 16 bits: integers that float32 holds exactly, whatever is added to zero."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tap:
    """Zeros for one lookup of a table, and the record that is their cotangent. Leading dims are those of the call, with layers
    and micro-batches in front.

    Attributes:
        words: ids + 1 by 16 bits, lowest first; 0 for no row (..., K, 2 or 4) float32.
        coefficients: (..., K), or None where each slot has a vector of its own.
        vectors: (..., V), or (..., K, V).
    """

    words: jax.Array
    coefficients: jax.Array | None
    vectors: jax.Array


class Anchor:
    """What all copies of one taped table share: the array, and which lookups a trace of the model has found.

    Attributes:
        array: (M, V) or stacked (L, M, V); a constant of the loss.
    """

    def __init__(self, array: jax.Array):
        self.array = array
        self._calls: dict[tuple[str, int], Tap] = {}
        self._seen: list[tuple[Any, int]] = []

    def number(self, layer: Any) -> int:
        """Which lookup this is of the module that holds `layer`."""
        for i, (known, count) in enumerate(self._seen):
            if known is layer:
                self._seen[i] = (known, count + 1)
                return count
        self._seen.append((layer, 1))
        return 0

    def found(self, place: str, number: int, tap: Tap, times: tuple[int, ...]) -> None:
        """Note the shapes of a lookup's tap, one for each of the layers that a scan stacks."""
        stacked = lambda s: jax.ShapeDtypeStruct((*times, *s.shape), s.dtype)  # noqa: E731
        self._calls[place, number] = jax.tree.map(stacked, tap)

    def taps(self) -> Any:
        """Zeros for every lookup that was found, in their order; by place where several layers read the table."""
        by_place: dict[str, tuple[Tap, ...]] = {}
        for place, number in sorted(self._calls):
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self._calls[place, number])
            by_place[place] = (*by_place.get(place, ()), zeros)
        return by_place.get("", ()) if by_place.keys() <= {""} else by_place


@jax.tree_util.register_pytree_node_class
class TapedTable:
    """In the place of a table's array.

    Attributes:
        anchor: the array and what is known of its lookups.
        layer: () int32, place in the stack; 0 for a table of one layer.
        taps: one for each lookup, or those of all places by name; None while a trace finds them.
        place: what reads it, of a table that several layers share; empty for the table of one layer.
        times: how often a scan runs that place; empty where there is none.
    """

    def __init__(self, anchor: Anchor, layer: Any, taps: Any, place: str = "", times: tuple[int, ...] | None = None):
        self.anchor, self.layer, self.taps, self.place = anchor, layer, taps, place
        self.times = anchor.array.shape[:-2] if times is None else times

    def tree_flatten(self):
        return (self.layer, self.taps), (self.anchor, self.place, self.times)

    @classmethod
    def tree_unflatten(cls, known, children):
        anchor, *where = known
        return cls(anchor, *children, *where)

    def at(self, place: str, repeats: int | None = None) -> "TapedTable":
        """The table with the taps of one place; see `reading`."""
        place = f"{self.place}.{place}".lstrip(".")
        taps, times = self.taps, self.times if repeats is None else (repeats,)
        if isinstance(taps, dict):
            below = {name: own for name, own in taps.items() if name.startswith(f"{place}.")}
            taps = taps.get(place, below)
        # A new array, by which the lookups of this place are told from those of others.
        return TapedTable(self.anchor, jnp.zeros(() if repeats is None else (repeats,), jnp.int32), taps, place, times)

    def __getitem__(self, index: Any) -> "TapedTable":
        if index is not ...:
            raise TypeError("a table whose optimizer works by rows is read with row_lookup or row_dot alone")
        return self

    @property
    def array(self) -> jax.Array:
        return self.anchor.array

    @property
    def shape(self) -> tuple[int, int]:
        return self.array.shape[-2:]

    @property
    def ndim(self) -> int:
        return 2

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    def pooled(self, out: jax.Array, rows: Any, weights: jax.Array) -> jax.Array:
        """`out = sum over k of weights[k] * row[k]`: the weights meet the cotangent."""
        return self._through(out, rows, weights, "pooled")

    def gathered(self, out: jax.Array, rows: Any) -> jax.Array:
        """`out[k] = row[k]`."""
        return self._through(out, rows, None, "gathered")

    def products(self, out: jax.Array, rows: Any, x: jax.Array) -> jax.Array:
        """`out[k] = row[k] . x`: the cotangent meets x."""
        return self._through(out, rows, x, "products")

    def _through(self, out, rows, other, kind):
        number = self.anchor.number(self.layer)
        if self.taps is None:
            shapes = jax.eval_shape(lambda *args: _record(kind, *args), rows, other, out)
            self.anchor.found(self.place, number, shapes, self.times)
            return out
        if kind == "pooled":
            return _pooled(out, self.taps[number], rows, jax.lax.stop_gradient(other))
        if kind == "products":
            return _products(out, self.taps[number], rows, jax.lax.stop_gradient(other))
        return _gathered(out, self.taps[number], rows)


def reading(shared: Any, place: str, repeats: int | None = None) -> list[TapedTable]:
    """The taped tables of a tree of shared modules as one place of the model reads them, with that place's taps.

    Args:
        place: names it among those below the place that the tree was made for; one that is no further divided makes lookups.
        repeats: a scan runs the place so often; what is given here is to be scanned over.
    """
    return [leaf.at(place, repeats) for leaf in jax.tree.leaves(shared, is_leaf=_is_taped) if _is_taped(leaf)]


def with_tables(shared: Any, tables: Sequence[TapedTable]) -> Any:
    """The tree with other taped tables, in the order of `reading`."""
    if not tables:
        return shared
    others = iter(tables)
    return jax.tree.map(lambda leaf: next(others) if _is_taped(leaf) else leaf, shared, is_leaf=_is_taped)


def _is_taped(node: Any) -> bool:
    return isinstance(node, TapedTable)


def _record(kind: str, rows: Any, other: jax.Array | None, cotangent: jax.Array) -> Tap:
    words = _words(rows)
    if kind == "pooled":
        return Tap(words, other.astype(jnp.float32), cotangent)
    return Tap(words, cotangent, other) if kind == "products" else Tap(words, None, cotangent)


def _port(kind: str):
    """The result of a lookup unchanged; the cotangent of the tap is the record."""

    @jax.custom_vjp
    def port(out, tap, *known):
        return out

    def forward(out, tap, *known):
        return out, known

    def backward(known, cotangent):
        rows, other = known if len(known) == 2 else (*known, None)
        return cotangent, _record(kind, rows, other, cotangent), *(None for _ in known)

    port.defvjp(forward, backward)
    return port


_pooled, _gathered, _products = _port("pooled"), _port("gathered"), _port("products")


def _words(rows: jax.Array | WideRows) -> jax.Array:
    mask = (1 << WORD) - 1
    if not isinstance(rows, WideRows):
        plus_one = jnp.where(rows >= 0, rows, -1).astype(jnp.uint32) + jnp.uint32(1)
        parts = [plus_one & mask, plus_one >> WORD]
    else:
        none = rows.high < 0
        low = jnp.where(none, jnp.uint32(0), rows.low + jnp.uint32(1))
        carried = jnp.where(~none & (low == 0), 1, 0)
        high = (jnp.where(none, 0, rows.high) + carried).astype(jnp.uint32)
        parts = [low & mask, low >> WORD, high & mask, high >> WORD]
    return jnp.stack([part.astype(jnp.float32) for part in parts], axis=-1)


def rows_of(words: jax.Array) -> jax.Array | WideRows:
    """Ids of a record; negative for none."""
    parts = [words[..., i].astype(jnp.uint32) for i in range(words.shape[-1])]
    low = parts[0] | (parts[1] << WORD)
    if len(parts) == 2:
        return low.astype(jnp.int32) - 1
    high = (parts[2] | (parts[3] << WORD)).astype(jnp.int32)
    return WideRows(high - (low == 0).astype(jnp.int32), low - jnp.uint32(1))
