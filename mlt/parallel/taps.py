"""Gradients of tables that never take a table's size: what a lookup read, and what came back to it.

The gradient of a lookup is a sum over its tokens and slots, `coefficient * vector` added to the row that was read. For a
table whose optimizer works by rows, a `TapedTable` stands in the module where the array was. It reads the array as a constant,
and each lookup passes its result through a *tap*: an extra input of zeros whose cotangent is defined to be the record of the
call. Differentiating the loss by the taps hence gives ids, coefficients and vectors, stacked over scanned layers as parameters
are, through rematerialization and micro-batches, and no mixer need know.
"""

import dataclasses
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
    """What all copies of one taped table share: the array, and how many lookups each trace of the module has made.

    Attributes:
        array: (M, V) or stacked (L, M, V); a constant of the loss.
        calls: shapes of the taps, in the order of the lookups, once a trace has found them.
    """

    def __init__(self, array: jax.Array):
        self.array = array
        self.calls: dict[int, Tap] = {}
        self._seen: list[tuple[Any, int]] = []

    def number(self, layer: Any) -> int:
        """Which lookup this is of the module that holds `layer`."""
        for i, (known, count) in enumerate(self._seen):
            if known is layer:
                self._seen[i] = (known, count + 1)
                return count
        self._seen.append((layer, 1))
        return 0


@jax.tree_util.register_pytree_node_class
class TapedTable:
    """In the place of a table's array.

    Attributes:
        anchor: the array and what is known of its lookups.
        layer: () int32, place in the stack; 0 for a table of one layer.
        taps: one for each lookup; None while a trace finds them.
    """

    def __init__(self, anchor: Anchor, layer: Any, taps: tuple[Tap, ...] | None):
        self.anchor, self.layer, self.taps = anchor, layer, taps

    def tree_flatten(self):
        return (self.layer, self.taps), self.anchor

    @classmethod
    def tree_unflatten(cls, anchor, children):
        return cls(anchor, *children)

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
            self.anchor.calls[number] = shapes
            return out
        if kind == "pooled":
            return _pooled(out, self.taps[number], rows, jax.lax.stop_gradient(other))
        if kind == "products":
            return _products(out, self.taps[number], rows, jax.lax.stop_gradient(other))
        return _gathered(out, self.taps[number], rows)


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
