"""The train state: everything a step reads and writes, and where it lies on the mesh."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from mlt.model.lm import LM
from mlt.nn.param import initialize, partition, put
from mlt.optim.base import state_shardings
from mlt.optim.table import filled, without
from mlt.parallel.rules import Rules
from mlt.train.guard import GuardState, fresh_guard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Attributes:
    step: int32, steps done, skipped ones included.
    model: parameters (float32) and buffers.
    optimizer: optax state.
    key: the run's random key data (uint32), from which every later draw is folded.
    guard: what the guard remembers of the steps before.
    """

    step: jax.Array
    model: LM
    optimizer: Any
    key: jax.Array
    guard: GuardState


def abstract_state(specs: LM, optimizer: optax.GradientTransformation, rules: Rules) -> TrainState:
    """Shapes, types and shardings of the state; nothing is allocated."""
    everywhere = NamedSharding(rules.mesh, PartitionSpec())
    model = jax.tree.map(lambda spec, where: spec.abstract(where), specs, rules.param_shardings(specs))
    shapes = jax.eval_shape(optimizer.init, partition(model)[0])
    places = state_shardings(shapes, partition(specs)[0], rules)
    slots = jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, places)
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere),
        model=model,
        optimizer=slots,
        key=jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=everywhere),
        guard=jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=everywhere), jax.eval_shape(fresh_guard)),
    )


def abstract_batch(
    rules: Rules, rows: int, length: int, extra: Mapping[str, jax.ShapeDtypeStruct] | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, types and shardings of a batch of `rows` by `length` tokens.

    Args:
        extra: other fields, as one token has them.
    """
    where = rules.sharding(("batch", "seq"))
    types = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), jnp.int32) | {"weights": jnp.float32}
    fields = {name: jax.ShapeDtypeStruct((), kind) for name, kind in types.items()} | dict(extra or {})
    return {name: jax.ShapeDtypeStruct((rows, length, *one.shape), one.dtype, sharding=where) for name, one in fields.items()}


def create_state(
    specs: LM, optimizer: optax.GradientTransformation, rules: Rules, seed: int, given: Mapping[str, jax.Array] | None = None
) -> TrainState:
    """A fresh state, each device making its own part.

    Args:
        given: parameters and buffers by name, laid out as the model's, that are taken as they are; the others are drawn.
    """
    abstract = abstract_state(specs, optimizer, rules)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    given = given or {}
    model = filled(initialize(without(specs, given), seed, without(shardings.model, given)), dict(given))
    slots = jax.jit(optimizer.init, out_shardings=shardings.optimizer)(partition(model)[0])
    step = put(np.zeros((), np.int32), shardings.step)
    key = np.asarray(jax.random.key_data(jax.random.key(seed)))
    guard = jax.tree.map(lambda value, where: put(np.asarray(value), where), fresh_guard(), shardings.guard)
    return TrainState(step, model, slots, put(key, shardings.key), guard)
