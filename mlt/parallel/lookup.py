"""Reading rows of a table over the mesh: by a reduction of what owners make of them, or by an exchange of the rows.

`reduce` sends ids to every owner; each reads its rows for the tokens of all shards, sums weighted ones, and the results meet
in a reduce-scatter: one result for each token and shard. `exchange` brings a device the distinct rows that its tokens read.
Both give the same function; which receives less depends on the sizes (`table.choose`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import mlt_kernels

from mlt.parallel import table
from mlt.parallel.local import STREAM, TOKENS, Axes, local
from mlt.parallel.rules import Rules
from mlt.parallel.table import AXES, Exchange, Strategy, WideRows
from mlt.parallel.taps import TapedTable

Read = Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]

CHOICE: Axes = (*TOKENS, None)


def row_lookup(
    rules: Rules,
    values: jax.Array | TapedTable,
    rows_BTK: jax.Array | WideRows,
    weights_BTK: jax.Array | None,
    *,
    strategy: Strategy | None,
    capacity: float | None,
    **options: Any,
) -> tuple[jax.Array, jax.Array | None]:
    """(rows or their weighted sum, rows of all devices that did not fit in the first round; None where nothing is exchanged)."""
    rows_BTK = table.row_ids(rows_BTK, values.shape[0])

    def read(rows_MV, ids, weights):
        if weights is not None and isinstance(values, TapedTable):
            return _pool_constant(rows_MV, ids, weights, tuple(options.items()))
        return mlt_kernels.row_lookup(rows_MV, ids, weights, **options)

    pooled = weights_BTK is not None
    strategy = strategy or chosen(rules, values.shape, rows_BTK.shape, pooled=pooled)
    output = STREAM if pooled else (*TOKENS, None, None)
    out, waiting = _run(rules, values, rows_BTK, weights_BTK, CHOICE, read, output, strategy, capacity)
    if isinstance(values, TapedTable):
        out = values.pooled(out, rows_BTK, weights_BTK) if pooled else values.gathered(out, rows_BTK)
    return out, waiting


def row_dot(rules: Rules, values: jax.Array | TapedTable, rows_BTK: Any, x_BTV: jax.Array, **options: Any) -> jax.Array:
    """Products of rows with the token's vector, (B, T, K): one number for each row read, so rows never travel."""
    rows_BTK = table.row_ids(rows_BTK, values.shape[0])

    def read(rows_MV, ids, x):
        if isinstance(values, TapedTable):
            return _dot_constant(rows_MV, ids, x, tuple(options.items()))
        return mlt_kernels.row_dot(rows_MV, ids, x, **options)

    out, _ = _run(rules, values, rows_BTK, x_BTV, STREAM, read, CHOICE, "reduce", None)
    return values.products(out, rows_BTK, x_BTV) if isinstance(values, TapedTable) else out


def chosen(rules: Rules, table_shape: tuple[int, ...], choice: tuple[int, ...], *, pooled: bool) -> Strategy:
    """How a lookup of (B, T, K) rows crosses the owners of an (M, V) table: what receives less."""
    shards = rules.size("memory")
    tokens = choice[0] * choice[1] // (rules.size("batch") * rules.size("seq"))
    shape = {"tokens": tokens, "slots": choice[2], "width": table_shape[1], "rows": table_shape[0]}
    return table.choose(**shape, shards=shards, pooled=pooled)


def _run(rules, values, rows, other, other_axes, read: Read, output, strategy, capacity):
    """`read(table, ids, other)` with a table split over owners."""
    array, layer = (values.array, values.layer) if isinstance(values, TapedTable) else (values, None)
    stacked = array.ndim == 3
    wide = isinstance(rows, WideRows)
    words = tuple(rows) if wide else (rows,)
    shards = rules.size("memory")
    together = rules.mesh is not None and rules.mesh.size > 1

    def run(array, layer, other, *words):
        own = array.shape[-2]
        flat = array.reshape(-1, array.shape[-1]) if stacked else array
        first = layer * own if stacked else 0

        def address(words):
            owner, row = table.owner_of(WideRows(*words) if wide else words[0], shards, own)
            return owner, row + first

        if shards == 1 and not stacked and not wide:
            return read(flat, words[0], other), jnp.zeros((), jnp.int32)
        if shards == 1:
            owner, row = address(words)
            return read(flat, jnp.where(owner == 0, row, -1), other), jnp.zeros((), jnp.int32)
        if strategy == "reduce":
            gather = lambda x: jax.lax.all_gather(x, AXES, axis=0, tiled=True)  # noqa: E731
            owner, row = address(tuple(gather(word) for word in words))
            ids = jnp.where(owner == jax.lax.axis_index(AXES), row, -1)
            out = read(flat, ids, None if other is None else gather(other))
            return jax.lax.psum_scatter(out, AXES, scatter_dimension=0, tiled=True), jnp.zeros((), jnp.int32)
        owner, row = address(words)
        size = max(min(row.size, shards * flat.shape[0]), 1)
        found = table.distinct(owner.reshape(-1), row.reshape(-1), shards, size)
        how = Exchange.of(rules, size, capacity)
        out = read(table.fetch(flat, found, how), found.inverse_N.reshape(row.shape), other)
        return out, jax.lax.psum(how.waiting(found.start_O), rules.mesh.axis_names) // rules.size("heads")

    layers = ("layers",) if stacked else ()
    inputs = ((*layers, "memory", None), (), other_axes, *(CHOICE for _ in words))
    layer = jnp.asarray(layer, jnp.int32) if stacked else None
    out, waiting = local(run, rules, inputs, (output, ()))(array, layer, other, *words)
    return out, waiting if together and shards > 1 and strategy == "exchange" else None


def _constant(forward: Callable[..., jax.Array], backward: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """An op on rows of a table that is a constant: its gradient goes to the other argument, and none is made of the table."""

    def op(rows_MV, ids, other, options):
        return forward(rows_MV, ids, other, **dict(options))

    def fwd(rows_MV, ids, other, options):
        return op(rows_MV, ids, other, options), (rows_MV, ids, other)

    def bwd(options, saved, grad):
        rows_MV, ids, other = saved
        return None, None, backward(rows_MV, ids, grad, **dict(options)).astype(other.dtype)

    made = jax.custom_vjp(op, nondiff_argnums=(3,))
    made.defvjp(fwd, bwd)
    return made


_pool_constant = _constant(mlt_kernels.row_lookup, lambda rows, ids, grad, **_: mlt_kernels.row_dot(rows, ids, grad))
_dot_constant = _constant(mlt_kernels.row_dot, lambda rows, ids, grad, **_: mlt_kernels.row_lookup(rows, ids, grad))
