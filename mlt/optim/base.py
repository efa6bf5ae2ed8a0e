"""The contract of optimizers: a config that builds an optax transformation for a tree of described parameters."""

from abc import abstractmethod
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from mlt.config.base import Config
from mlt.nn.param import ParamSpec, named_leaves, path_name
from mlt.optim.schedule import Schedule
from mlt.optim.table import TableOptimizer, with_tables
from mlt.parallel.rules import Rules

MAX_SETTINGS = 8
"""Values in an array of settings that an optimizer keeps in its state (Muon's polynomial); every device holds them."""


class OptimizerConfig(Config):
    """Builds the update rule.

    Attributes:
        learning_rate: peak rate, before the schedule.
        tables: optimizers of sparse tables by name, the first that matches; tables that match none, and all of them where
            it is None, are trained as `build` says, from dense gradients.
    """

    learning_rate: float
    tables: TableOptimizer | tuple[TableOptimizer, ...] | None = None

    @abstractmethod
    def build(self, specs: Any, schedule: Schedule, steps: int) -> optax.GradientTransformation:
        """The transformation for the trained parameters described by `specs`; it knows nothing of `tables`."""

    @property
    def table_optimizers(self) -> tuple[TableOptimizer, ...]:
        return self.tables if isinstance(self.tables, tuple) else (self.tables,) if self.tables else ()

    def transformation(self, specs: Any, schedule: Schedule, steps: int) -> Any:
        """The whole update rule, tables with optimizers of their own included (`optim.table.TableAware`)."""
        rate = lambda factor: schedule.build(self.learning_rate * factor, steps)  # noqa: E731
        return with_tables(self.table_optimizers, specs, lambda specs: self.build(specs, schedule, steps), rate)


def group_tree(specs: Any, values: dict[str, Any], default: Any) -> Any:
    """A tree like `specs` holding `values[group]` of each parameter."""
    return jax.tree.map(lambda spec: values.get(spec.group, default), specs)


def state_shardings(state: Any, specs: Any, rules: Rules) -> Any:
    """Shardings of an optimizer state: a leaf that has the path suffix and shape of a parameter lies where it lies.

    A leaf with one dim less is a mean over that dim (a factored second moment) and lies where the others do.

    Args:
        state: abstract optimizer state (`jax.eval_shape` of the transformation's init).
        specs: described trained parameters.

    Raises:
        ValueError: an array leaf of more than a few values matches no parameter: its optimizer must declare its axes.
    """
    known: dict[str, ParamSpec] = dict(named_leaves(specs))

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        parts = path_name(path).split(".")
        for start in range(len(parts)):
            spec = known.get(".".join(parts[start:]))
            axes = None if spec is None else _axes_of(spec, leaf.shape)
            if axes is not None:
                return NamedSharding(rules.mesh, rules.spec(axes))
        if leaf.size > MAX_SETTINGS:
            raise ValueError(f"optimizer state {path_name(path)} of shape {leaf.shape} matches no parameter")
        return NamedSharding(rules.mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, state)


def _axes_of(spec: ParamSpec, shape: tuple[int, ...]) -> tuple[str | None, ...] | None:
    """Logical axes of a state array of this shape that belongs to the parameter; None if it has another shape."""
    if spec.shape == shape:
        return spec.axes
    for dropped in range(len(spec.shape)):
        if spec.shape[:dropped] + spec.shape[dropped + 1 :] == shape:
            return spec.axes[:dropped] + spec.axes[dropped + 1 :]
    return None
