"""The contract of optimizers: a config that builds an optax transformation for a tree of described parameters."""

from abc import abstractmethod
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from mlt.config.base import Config
from mlt.nn.param import ParamSpec, named_leaves, path_name
from mlt.optim.schedule import Schedule
from mlt.parallel.rules import Rules


class OptimizerConfig(Config):
    """Builds the update rule.

    Attributes:
        learning_rate: peak rate, before the schedule.
    """

    learning_rate: float

    @abstractmethod
    def build(self, specs: Any, schedule: Schedule, steps: int) -> optax.GradientTransformation:
        """The transformation for the trained parameters described by `specs`."""


def group_tree(specs: Any, values: dict[str, Any], default: Any) -> Any:
    """A tree like `specs` holding `values[group]` of each parameter."""
    return jax.tree.map(lambda spec: values.get(spec.group, default), specs)


def state_shardings(state: Any, specs: Any, rules: Rules) -> Any:
    """Shardings of an optimizer state: a leaf that has the path suffix and shape of a parameter lies where it lies.

    Args:
        state: abstract optimizer state (`jax.eval_shape` of the transformation's init).
        specs: described trained parameters.

    Raises:
        ValueError: an array leaf of more than one value matches no parameter: its optimizer must declare its axes.
    """
    known: dict[str, ParamSpec] = dict(named_leaves(specs))

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        parts = path_name(path).split(".")
        for start in range(len(parts)):
            spec = known.get(".".join(parts[start:]))
            if spec is not None and spec.shape == leaf.shape:
                return NamedSharding(rules.mesh, rules.spec(spec.axes))
        if leaf.size > 1:
            raise ValueError(f"optimizer state {path_name(path)} of shape {leaf.shape} matches no parameter")
        return NamedSharding(rules.mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, state)
