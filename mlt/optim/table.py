"""Optimizers of sparse tables: which table is updated how, row by row or whole, beside the optimizer of everything else."""

import dataclasses
import fnmatch
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from mlt.config.base import Config
from mlt.config.problems import Problem
from mlt.nn.param import ParamSpec, named_leaves, path_name
from mlt.parallel.rows import RowGradient

Slots = dict[str, jax.Array]


class TableOptimizer(Config):
    """How tables whose names match are updated.

    Attributes:
        names: pattern of parameter names, as in a shell; `*.mixer.values` are those of product-key memories.
        rate: learning rate over that of the run's optimizer.
        weight_decay: of the rows that a step reads, times the learning rate.
    """

    lazy: ClassVar[bool] = True
    """Rows that no token of a step reads keep their values and state, and no dense gradient exists."""

    names: str = "*"
    rate: float = 5.0
    weight_decay: float = 0.0

    def problems(self) -> Iterator[Problem]:
        for name in ("rate", "weight_decay"):
            if getattr(self, name) < 0:
                yield Problem(name, getattr(self, name), "must not be negative")

    @abstractmethod
    def slots(self) -> dict[str, bool]:
        """State arrays by name; True for one of the table's shape, False for one number a row. All begin at zero."""

    @abstractmethod
    def step(self, slots: Slots, grad_RV: jax.Array, count: jax.Array) -> tuple[jax.Array, Slots]:
        """(direction (R, V) to go against, new slots) of rows that are read.

        Args:
            slots: (R, V) or (R,) float32.
            grad_RV: gradients, equal rows summed.
            count: steps of the run, this one included.
        """

    def update(
        self, rows_RV: jax.Array, slots: Slots, grad_RV: jax.Array, rate: jax.Array, count: jax.Array
    ) -> tuple[jax.Array, Slots]:
        direction_RV, slots = self.step(slots, grad_RV.astype(jnp.float32), count)
        return rows_RV - rate * (direction_RV + self.weight_decay * rows_RV), slots


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Updated:
    """In the place of an update: the parameter as it is afterwards, some of its rows written in place."""

    value: jax.Array


@dataclasses.dataclass(frozen=True)
class TableAware:
    """An optax transformation that also takes `RowGradient`s.

    Attributes:
        init, update: as in `optax.GradientTransformation`; an update may be `Updated`, see `apply_updates`.
        lazy: names of the tables whose gradients are to be rows.
    """

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]
    lazy: tuple[str, ...]


def assigned(optimizers: tuple[TableOptimizer, ...], specs: Any) -> dict[str, TableOptimizer]:
    """Optimizer of each table by name: the first whose pattern matches. The others stay with the run's optimizer."""
    found = {}
    for name, spec in named_leaves(specs):
        if spec.group == "table":
            match = next((o for o in optimizers if fnmatch.fnmatchcase(name, o.names)), None)
            if match is not None:
                found[name] = match
    return found


def without(tree: Any, names: Any) -> Any:
    """The tree with None in the place of the named leaves."""
    return jax.tree_util.tree_map_with_path(lambda p, leaf: None if path_name(p) in names else leaf, tree, is_leaf=is_rows)


def filled(tree: Any, values: dict[str, Any]) -> Any:
    """The tree with named values in the place of its Nones."""
    empty = lambda node: node is None or is_rows(node)  # noqa: E731
    return jax.tree_util.tree_map_with_path(lambda p, leaf: values.get(path_name(p), leaf), tree, is_leaf=empty)


def with_tables(
    optimizers: tuple[TableOptimizer, ...],
    specs: Any,
    build: Callable[[Any], optax.GradientTransformation],
    rate: Callable[[float], Callable[[jax.Array], jax.Array]],
) -> Any:
    """The run's optimizer for everything but the tables that have one of their own.

    Args:
        specs: described trained parameters.
        build: the run's optimizer for described parameters.
        rate: factor -> learning rate by step.
    """
    own = assigned(optimizers, specs)
    if not own:
        return build(specs)
    described = {name: spec for name, spec in named_leaves(specs) if name in own}
    rates = {name: rate(optimizer.rate) for name, optimizer in own.items()}
    dense = build(without(specs, own))

    def init(params: Any) -> Any:
        slots: dict[str, Any] = {}
        arrays = named(params)
        for name, optimizer in own.items():
            for slot, whole in optimizer.slots().items():
                shape = arrays[name].shape if whole else arrays[name].shape[:-1]
                slots.setdefault(slot, {})[name] = jnp.zeros(shape, jnp.float32)
        return {"dense": dense.init(without(params, own)), "tables": slots, "count": jnp.zeros((), jnp.int32)}

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        count = state["count"] + 1
        given, arrays = named(grads), named(params)
        updates, inner = dense.update(without(grads, own), state["dense"], without(params, own))
        slots = {slot: dict(held) for slot, held in state["tables"].items()}
        moved = {}
        for name, optimizer in own.items():
            held = {slot: slots[slot][name] for slot in optimizer.slots()}
            pieces = (optimizer, given[name], described[name], arrays[name], held, rates[name](state["count"]), count)
            moved[name], held = _by_rows(*pieces) if isinstance(given[name], RowGradient) else _whole(*pieces)
            for slot, value in held.items():
                slots[slot][name] = value
        return filled(updates, moved), {"dense": inner, "tables": slots, "count": count}

    return TableAware(init, update, tuple(name for name, optimizer in own.items() if optimizer.lazy))


def _by_rows(optimizer, grad, spec: ParamSpec, array, slots, rate, count):
    axes = {slot: spec.axes if whole else spec.axes[:-1] for slot, whole in optimizer.slots().items()}

    def update(old, grad_RV, rate, count):
        return optimizer.update(*old, grad_RV, rate, count)

    array, slots = grad.apply((array, slots), (spec.axes, axes), update, rate, count)
    return Updated(array), slots


def _whole(optimizer, grad, spec: ParamSpec, array, slots, rate, count):
    """From a dense gradient; of a lazy optimizer, rows without any gradient stay as they are."""
    del spec
    new, new_slots = optimizer.update(array, slots, grad, rate, count)
    if optimizer.lazy:
        read = jnp.any(grad != 0, axis=-1)
        keep = lambda new, old: jnp.where(read.reshape(read.shape + (1,) * (new.ndim - read.ndim)), new, old)  # noqa: E731
        new, new_slots = keep(new, array), {slot: keep(new_slots[slot], slots[slot]) for slot in slots}
    return new - array, new_slots


def is_rows(node: Any) -> bool:
    return isinstance(node, RowGradient | Updated)


def named(tree: Any) -> dict[str, Any]:
    """Leaf by name; a `RowGradient` is one leaf."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_rows)[0]}


def apply_updates(params: Any, updates: Any) -> Any:
    """`optax.apply_updates` where an update may be `Updated`."""
    return jax.tree.map(lambda p, u: u.value if isinstance(u, Updated) else (p + u).astype(p.dtype), params, updates)


def gradient_norm(grads: Any) -> jax.Array:
    """Global norm, that of merged rows included."""
    leaves = jax.tree.leaves(grads, is_leaf=is_rows)
    rows = [leaf.norm_squared() for leaf in leaves if isinstance(leaf, RowGradient)]
    dense = optax.tree.norm([leaf for leaf in leaves if not isinstance(leaf, RowGradient)])
    return jnp.sqrt(sum(rows, jnp.square(dense))) if rows else dense


def scaled(grads: Any, factor: jax.Array) -> Any:
    return jax.tree.map(lambda g: g.scaled(factor) if isinstance(g, RowGradient) else g * factor, grads, is_leaf=is_rows)


def rows_only_if(accepted: jax.Array, grads: Any) -> Any:
    """The same gradients, with no rows in those of tables where the step is not accepted."""
    return jax.tree.map(lambda g: g.only_if(accepted) if isinstance(g, RowGradient) else g, grads, is_leaf=is_rows)
