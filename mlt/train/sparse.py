"""Gradients in a train step where some tables are updated by rows: records in place of dense gradients."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mlt.nn.param import path_name
from mlt.optim.table import filled, named, without
from mlt.parallel.rows import merge
from mlt.parallel.rules import Rules
from mlt.parallel.taps import Anchor, TapedTable

Records = dict[str, Any]
"""What each table's lookups read and what came back, by the table's name: trees of `Tap`."""


def gradient(objective: Callable[..., Any], lazy: tuple[str, ...]) -> Callable[[Any, Any], tuple[Any, Any, Any, Records]]:
    """(trained, batch) -> (loss, aux, gradients with None for the lazy tables, records of those).

    Args:
        objective: (trained, batch) -> (what to differentiate, (loss, aux)).
        lazy: names of the tables that get no dense gradient.
    """

    def run(trained: Any, batch: Any) -> tuple[Any, Any, Any, Records]:
        dense, tables = without(trained, lazy), {name: leaf for name, leaf in named(trained).items() if name in lazy}
        taps = _find_taps(objective, dense, tables, batch) if lazy else {}

        def inner(given: tuple[Any, Records]) -> Any:
            dense, taps = given
            return objective(_taped(dense, {name: Anchor(array) for name, array in tables.items()}, taps), batch)

        (_, (loss, aux)), (grads, records) = jax.value_and_grad(inner, has_aux=True)((dense, taps))
        return loss, aux, grads, records

    return run


def with_rows(grads: Any, records: Records, trained: Any, rules: Rules) -> Any:
    """The gradients with each lazy table's merged rows in its place."""
    shapes = {name: leaf.shape for name, leaf in named(trained).items() if name in records}
    merged = {name: merge(taps, shapes[name], rules) for name, taps in records.items() if taps}
    return filled(grads, merged)


def kept(accept: jax.Array, new: Any, old: Any, lazy: tuple[str, ...], choose: Callable[..., Any]) -> Any:
    """`choose(accept, new, old)` for everything but lazy tables and their slots: those have been left alone row by row."""
    ends = tuple(f".{name}" for name in lazy)
    is_lazy = lambda path: f".{path_name(path)}".endswith(ends)  # noqa: E731
    return jax.tree_util.tree_map_with_path(lambda p, a, b: a if is_lazy(p) else choose(accept, a, b), new, old)


def _find_taps(objective: Callable[..., Any], dense: Any, tables: dict[str, jax.Array], batch: Any) -> Records:
    """Zeros for every lookup, found by tracing the loss once."""
    anchors = {name: Anchor(array) for name, array in tables.items()}
    jax.eval_shape(lambda dense, batch: objective(_taped(dense, anchors, None), batch), dense, batch)
    return {name: anchor.taps() for name, anchor in anchors.items()}


def _taped(dense: Any, anchors: dict[str, Anchor], taps: Records | None) -> Any:
    """The trained tree with taped tables in the places that `dense` leaves empty."""
    stand_ins = {}
    for name, anchor in anchors.items():
        stacked = anchor.array.ndim == 3
        layer = jnp.arange(anchor.array.shape[0], dtype=jnp.int32) if stacked else jnp.zeros((), jnp.int32)
        stand_ins[name] = TapedTable(anchor, layer, None if taps is None else taps[name])
    return filled(dense, stand_ins)
