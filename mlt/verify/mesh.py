"""A layout over devices computes what one device computes: loss, gradients and one update, in float32."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax

from mlt.config.run import RunConfig
from mlt.nn.param import named_leaves, partition
from mlt.parallel.mesh import Layout
from mlt.plan.collectives import Collective, collectives
from mlt.train.fit import check_fits
from mlt.train.setup import build_optimizer, describe_model, step_options
from mlt.train.state import TrainState, abstract_state, create_state
from mlt.train.step import train_step
from mlt.verify.material import clusters_of, packed_rows, shaken
from mlt.verify.result import Result

TOLERANCE = 1e-5
ROUNDINGS = 10
"""A gradient may differ by 1e-5, or by this many times what it moves by when every parameter moves by one or two units in
its last place: no float32 program can be expected to be nearer to another."""
MAX_TOKENS = 192


def keep_gradients(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer, with the gradients of its last update kept in its state as {"gradients", "inner"}."""

    def init(params: Any) -> Any:
        return {"gradients": optax.tree.zeros_like(params), "inner": optimizer.init(params)}

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, inner = optimizer.update(gradients, state["inner"], params)
        return updates, {"gradients": gradients, "inner": inner}

    return optax.GradientTransformation(init, update)


class MeshStep:
    """One compiled float32 train step of a config's model on a layout.

    Args:
        batch: rows that the layout can split.
        quick: leave out LLVM's optimization on CPU devices, which takes most of the time; the program sends the same.

    Attributes:
        state: where it starts; the same values on every layout.
        compiled: (state, batch) -> (state, metrics), nothing donated.
    """

    def __init__(self, config: RunConfig, layout: Layout, batch: dict[str, np.ndarray], *, seed: int = 0, quick: bool = False):
        self.rules = layout.rules(jax.devices()[: layout.num_devices])
        self.specs = describe_model(config)
        self.optimizer = keep_gradients(build_optimizer(config, self.specs))
        options = dataclasses.replace(step_options(config, self.rules, self.specs), dtype=jax.numpy.dtype("float32"))
        abstract = abstract_state(self.specs, self.optimizer, self.rules)
        if config.train.check_memory:
            check_fits(abstract, self.specs, self.rules)
        self.state = create_state(self.specs, self.optimizer, self.rules, seed=seed)
        self.batch = jax.device_put(batch, self.rules.sharding(("batch", "seq")))
        places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        step = functools.partial(train_step, optimizer=self.optimizer, options=options)
        with jax.default_matmul_precision("highest"):
            lowered = jax.jit(step, out_shardings=(places, None)).lower(self.state, self.batch)
            self.compiled = lowered.compile({"xla_backend_optimization_level": 0} if quick else None)

    def __call__(self, state: TrainState | None = None) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """(metrics, gradients by name) of one step."""
        new, metrics = self.compiled(self.state if state is None else state, self.batch)
        gradients = {name: np.asarray(leaf) for name, leaf in named_leaves(new.optimizer["gradients"])}
        return {name: float(value) for name, value in metrics.items()}, gradients

    def update(self, gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Parameters after the optimizer has been given these gradients."""
        trained, _ = partition(self.state.model)
        names = iter(gradients.values())
        given = jax.tree.map(lambda leaf: jax.device_put(next(names), leaf.sharding), trained)
        updates, _ = jax.jit(self.optimizer.update)(given, self.state.optimizer, trained)
        return {name: np.asarray(leaf) for name, leaf in named_leaves(optax.apply_updates(trained, updates))}

    def shaken(self) -> TrainState:
        """The start with every parameter moved by one or two units in its last place (`material.shaken`)."""
        moved = shaken(self.state.model)
        place = lambda value, leaf: jax.device_put(value, leaf.sharding)  # noqa: E731
        return dataclasses.replace(self.state, model=jax.tree.map(place, moved, self.state.model))

    def collectives(self) -> list[Collective]:
        return collectives(self.compiled.as_text())


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float(np.linalg.norm(found.astype(np.float64) - expected) / (np.linalg.norm(expected) + 1e-12))


def rows_for(config: RunConfig, layout: Layout, seed: int) -> dict[str, np.ndarray]:
    """Packed rows that the layout can split: at least two a micro-batch, and as many as it has batch shards."""
    pieces = 2 * layout.context
    length = max(min(config.data.sequence_length, MAX_TOKENS) // pieces, 1) * pieces
    rows = layout.batch_shards * (2 if layout.batch_shards == 1 else 1) * config.train.grad_accumulation
    ids = config.data.tokenizer.vocab_size
    clusters = clusters_of(config.model.stack)
    return packed_rows(np.random.default_rng(seed), rows=rows, length=length, num_ids=ids, **clusters)


def compare(single: MeshStep, other: MeshStep) -> dict[str, tuple[float, float]]:
    """Relative difference of the loss, of every gradient and of the update, each with its bound, by name."""
    metrics, gradients = single()
    _, moved = single(single.shaken())
    other_metrics, other_gradients = other()
    loss = abs(other_metrics["train/loss"] - metrics["train/loss"]) / abs(metrics["train/loss"])
    found = {"loss": (loss, TOLERANCE)}
    for name, value in gradients.items():
        bound = max(TOLERANCE, ROUNDINGS * distance(moved[name], value))
        found[f"gradient of {name}"] = (distance(other_gradients[name], value), bound)
    # From the same gradients: the first step of Adam is the sign of a gradient, and that of a zero is noise.
    expected, updated = single.update(gradients), other.update(gradients)
    found["update"] = (max(distance(updated[name], value) for name, value in expected.items()), TOLERANCE)
    return found


def mesh(config: RunConfig, layout: Layout, seed: int) -> tuple[Result, list[Collective]]:
    """Compare a layout with one device; also what the layout's step sends."""
    batch = rows_for(config, layout, seed)
    other = MeshStep(config, layout, batch, seed=seed)
    found = compare(MeshStep(config, Layout(), batch, seed=seed), other)
    failed = {name: pair for name, pair in found.items() if not pair[0] <= pair[1]}
    gradients = {name: pair for name, pair in found.items() if name.startswith("gradient")}
    worst = max(failed or gradients, key=lambda name: found[name][0] / found[name][1])
    error, bound = found[worst]
    what = f"{len(failed)} too far, worst" if failed else "largest"
    facts = f"loss {found['loss'][0]:.1e}, {len(gradients)} gradients, update {found['update'][0]:.1e}; "
    facts += f"{what}: {worst} {error:.1e} (bound {bound:.1e})"
    return Result("mesh", not failed, facts), other.collectives()
