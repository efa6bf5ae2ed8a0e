"""What a train step takes of each device under a layout: bytes by class, FLOPs, what crosses devices, and the least time.

The step is traced as it will run, on a mesh without devices, and walked (`plan/program.py`): nothing is compiled.
"""

import dataclasses
import functools
import math
from collections import Counter
from typing import Any

import jax
from mlt_kernels import dispatch

from mlt.config.run import RunConfig
from mlt.model.count import count
from mlt.nn.param import partition
from mlt.parallel.memory import bytes_on_device
from mlt.parallel.mesh import AXES, Layout
from mlt.parallel.rules import Rules
from mlt.plan import splits
from mlt.plan.devices import Pool
from mlt.plan.program import Held, Program, Tally
from mlt.train.clusters import cluster_fields
from mlt.train.hashing import HostHashes
from mlt.train.neighbours import neighbour_fields
from mlt.train.residents import on_devices, on_host, residents
from mlt.train.setup import build_optimizer, describe_model, step_options
from mlt.train.state import TrainState, abstract_batch, abstract_state
from mlt.train.step import train_step

STATE = ("parameters", "optimizer state", "buffers and batch")
"""Classes of what is there all the time, to the byte; the others are a forecast."""

MOST_OVER = 1.5
"""Times what is forecast beside the state that XLA has been seen to allot (`tools/plan_accuracy.py`)."""

LONG_LIVED = 0.1
"""Share of the operations of a loop, or of the program outside loops, for which an array must live to count as kept."""


@dataclasses.dataclass(frozen=True)
class TracedStep:
    """A train step on a mesh, described and traced.

    Attributes:
        state, batch: shapes and shardings.
        program: the traced step.
        flops_per_token: of the model, forward.
    """

    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    program: Any
    flops_per_token: float


@dataclasses.dataclass(frozen=True)
class Crossing:
    """What one kind of collective over some mesh axes brings to a device in a step.

    Attributes:
        over: "links", "network" or "host".
        seconds: at the full rate of these.
    """

    kind: str
    axes: tuple[str, ...]
    nbytes: float
    over: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class Forecast:
    """One layout on some devices.

    Attributes:
        classes: bytes of a device: the state, and what the step's fullest moment adds, by class.
        moment: where in the traced step that is.
        tokens: of a step.
        flops: that a device computes in a step, recomputation included.
        model_flops: of the model, of which a device's share in a step; without recomputation.
        compute_seconds: every kernel at the larger of its products' and its bytes' time.
        unknown: calls and loops that could not be counted.
    """

    layout: Layout
    pool: Pool
    classes: dict[str, int]
    moment: str
    tokens: int
    flops: float
    model_flops: float
    compute_seconds: float
    crossings: tuple[Crossing, ...]
    unknown: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(self.classes.values())

    @property
    def state_bytes(self) -> int:
        return sum(self.classes[name] for name in STATE)

    @property
    def fits(self) -> bool:
        return self.nbytes <= self.pool.device.usable

    @property
    def is_tight(self) -> bool:
        """Whether it would not fit if the compiler allotted as much more as it has been seen to."""
        beside = self.nbytes - self.state_bytes
        return self.fits and self.state_bytes + MOST_OVER * beside > self.pool.device.usable

    @property
    def crossing_seconds(self) -> float:
        return sum(one.seconds for one in self.crossings)

    @property
    def least_seconds(self) -> float:
        """Everything overlaps."""
        return max(self.compute_seconds, self.crossing_seconds)

    @property
    def most_seconds(self) -> float:
        """Nothing overlaps, and everything runs at its full rate."""
        return self.compute_seconds + self.crossing_seconds

    def utilization(self, seconds: float) -> float:
        """Model FLOPs over the data sheet's."""
        return self.model_flops / seconds / self.pool.device.flops


def forecast(config: RunConfig, pool: Pool) -> Forecast:
    """What the step of a checked config takes on these devices; its mesh has as many."""
    layout, device = config.mesh, pool.device
    hosts = max(1, pool.count // device.near) if on_host(config) else 1
    with dispatch.target_platform(device.platform):
        step = traced_step(config, layout.abstract_rules(), hosts)
    held, tally = walked(step, layout, device.platform)
    tokens = config.data.batch_size * config.data.sequence_length
    model_flops = 3 * step.flops_per_token * tokens / pool.count
    # Loops of unknown length count once: what they leave out is in the model's own count, a third more where it is recomputed.
    again = 1 if config.remat.mode == "none" else 4 / 3
    left_out = max(0.0, again * model_flops - tally.flops) if tally.unknown_loops or tally.opaque else 0.0
    rate = device.matrix_rate(config.train.compute_dtype)
    return Forecast(
        layout,
        pool,
        {**state_classes(step.state, step.batch), **moment_classes(held, step.state)},
        held.source,
        tokens,
        tally.flops + left_out,
        model_flops,
        _seconds(tally, rate, device.copy_rate) + left_out / rate,
        tuple(_crossings(tally, layout, pool)),
        tuple(_unknown(tally)),
    )


def traced_step(config: RunConfig, rules: Rules, hosts: int = 1) -> TracedStep:
    """Describes and traces the step on a mesh, with devices or without."""
    whole = describe_model(config)
    specs = on_devices(config, whole, hosts)
    optimizer = build_optimizer(config, specs)
    state = abstract_state(specs, optimizer, rules)
    batch = abstract_batch(rules, config.data.batch_size, config.data.sequence_length, batch_fields(config, whole, hosts))
    step = functools.partial(train_step, optimizer=optimizer, options=step_options(config, rules, specs))
    flops = count(config.model, whole, config.data.sequence_length).flops_per_token
    return TracedStep(state, batch, jax.make_jaxpr(step)(state, batch), flops)


def batch_fields(config: RunConfig, specs: Any, hosts: int) -> dict[str, jax.ShapeDtypeStruct]:
    """What a batch has beside its tokens, as one token has it."""
    tables = residents(config, specs, hosts) if on_host(config) else []
    return {**cluster_fields(config), **neighbour_fields(config), **HostHashes(config, tables, None).fields()}


def walked(step: TracedStep, layout: Layout, platform: str) -> tuple[Held, Tally]:
    """What a device holds at the fullest moment beside the step's arguments, and what it does."""
    sizes = layout.shape()
    given = [_split(leaf, layout) for leaf in jax.tree.leaves((step.state, step.batch))]
    parameters: dict[tuple[int, ...], splits.Split] = {}
    for leaf in jax.tree.leaves(partition(step.state.model)[0]):
        split = _split(leaf, layout)
        parameters.setdefault(leaf.shape, split)
        parameters.setdefault(leaf.shape[1:], split[1:])  # one layer of stacked ones
    program = Program(sizes, parameters, copies_gradients=platform == "gpu")
    return program.run(step.program, given), program.tally


def state_classes(state: TrainState, batch: dict[str, jax.ShapeDtypeStruct]) -> dict[str, int]:
    """Bytes of a device of what is there all the time."""
    trained, buffers = partition(state.model)
    return {
        "parameters": sum(map(bytes_on_device, jax.tree.leaves(trained))),
        "optimizer state": sum(map(bytes_on_device, jax.tree.leaves(state.optimizer))),
        "buffers and batch": sum(map(bytes_on_device, jax.tree.leaves((buffers, batch)))),
    }


def moment_classes(held: Held, state: TrainState) -> dict[str, int]:
    """What is held at the fullest moment, by what it is for."""
    shapes = {leaf.shape for leaf in jax.tree.leaves(partition(state.model)[0])}
    deepest = max((depth for depth, _ in held.stores), default=0)
    found: Counter[str] = Counter({"gradients": 0, "kept for the backward pass": 0, "in use at once": 0})
    for depth, store in held.stores:
        region = store.region
        lived = (store.last - store.born) / max(region.time, 1) if region is not None else 1.0
        if tuple(store.shape) in shapes:
            found["gradients"] += store.nbytes
        elif depth < deepest or lived > LONG_LIVED:
            found["kept for the backward pass"] += store.nbytes
        else:
            found["in use at once"] += store.nbytes
    return dict(found)


def _split(leaf: jax.ShapeDtypeStruct, layout: Layout) -> splits.Split:
    return splits.effective(splits.from_spec(leaf.sharding.spec, len(leaf.shape)), layout.shape())


def _seconds(tally: Tally, matrix: float, copy: float) -> float:
    return sum(max(flops / matrix, moved / copy) * times for (flops, moved), times in tally.kernels.items())


def _crossings(tally: Tally, layout: Layout, pool: Pool) -> list[Crossing]:
    """The largest first. Axes lie on the devices in the order of `AXES`, the last on neighbours."""
    found = []
    for (kind, axes), nbytes in tally.crossings.items():
        if not axes:
            found.append(Crossing(kind, axes, nbytes, "host", nbytes / pool.device.host))
            continue
        first = min(AXES.index(axis) for axis in axes)
        span = math.prod(layout.shape()[axis] for axis in AXES[first:])
        rate, over = pool.device.receiving(span)
        found.append(Crossing(kind, axes, nbytes, over, nbytes / rate))
    return sorted(found, key=lambda one: -one.seconds)


def _unknown(tally: Tally) -> list[str]:
    calls = [f"{name} ({times} calls)" for name, times in tally.opaque.items()]
    return calls + ([f"{tally.unknown_loops} loops of unknown length"] if tally.unknown_loops else [])
