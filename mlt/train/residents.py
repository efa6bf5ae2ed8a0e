"""Tables that a run keeps in host memory: which, of what size, and what cannot be done with them."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from mlt.config.problems import Problem, walk
from mlt.config.run import RunConfig
from mlt.errors import UserError
from mlt.mixers.channel.engram import ROW_MULTIPLE, Engram, EngramMixer
from mlt.model.lm import LM
from mlt.nn.param import ParamSpec, named_leaves, partition, path_name
from mlt.optim.table import TableOptimizer, assigned
from mlt.parallel.memory import machine_bytes
from mlt.parallel.rules import Rules
from mlt.parallel.table import MOST_LOCAL_ROWS
from mlt.train.host_parts import parts_of

TABLE = ""
"""Among the names of a table's arrays, the table's own; the others are slots of its optimizer."""

SETS_IN_FLIGHT = 3
"""Buffers of rows on the devices at once: what the newest step makes, what comes from the host, and both put together."""

SAVING_COPIES = 3
"""A table in host memory while a checkpoint is taken: the table, what is handed over, and what is written from."""


@dataclasses.dataclass(frozen=True)
class Resident:
    """One table in host memory.

    Attributes:
        parameter: its name in the model.
        layer: the name of its rows in a batch.
        spec: as the model describes it.
        held: rows of a host for which the devices have room.
        optimizer: what updates it.
        hosts: parts in which it is split, one for each group of processes that hold the same rows.
    """

    parameter: str
    layer: str
    spec: ParamSpec
    held: int
    optimizer: TableOptimizer | None
    hosts: int = 1

    @property
    def own_rows(self) -> int:
        """Rows of one part."""
        return self.spec.shape[-2] // self.hosts

    @property
    def room(self) -> int:
        """Rows on the devices, those of all hosts together."""
        return self.held * self.hosts

    @property
    def host_bytes(self) -> int:
        """Of a part of the table and of its slots, in the memory of each of its processes."""
        return self.nbytes(self.own_rows)

    @property
    def buffer_bytes(self) -> int:
        """Of all the devices together, of one copy: rows and slots, as often as they are there at once."""
        return SETS_IN_FLIGHT * self.nbytes(self.room)

    def slots(self) -> dict[str, bool]:
        return {} if self.optimizer is None else self.optimizer.slots()

    def is_wide(self, name: str) -> bool:
        """Whether an array has a value for each of a row's values, and not one a row."""
        return name == TABLE or self.slots()[name]

    def shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        """Of a table of so many rows and of its slots."""
        whole = (*self.spec.shape[:-2], rows, self.spec.shape[-1])
        return {name: whole if self.is_wide(name) else whole[:-1] for name in (TABLE, *self.slots())}

    def nbytes(self, rows: int) -> int:
        """Of a table of so many rows and of its slots, float32."""
        return 4 * sum(math.prod(shape) for shape in self.shapes(rows).values())

    def positions_of(self, rows_U: np.ndarray) -> np.ndarray:
        """Where a batch's rows, ascending, stand among those on the devices: each part fills its own room from the front."""
        part_U = rows_U // self.own_rows
        first_U = rows_U.searchsorted(part_U * self.own_rows)
        return np.arange(rows_U.size) - first_U + part_U * self.held

    @property
    def rows_dim(self) -> int:
        """The dim of the rows, of every array."""
        return len(self.spec.shape) - 2

    def places(self, rules: Rules) -> dict[str, Any]:
        """Shardings of the rows on the devices."""
        return {name: rules.sharding(self.axes(name)) for name in (TABLE, *self.slots())}

    def axes(self, name: str) -> tuple[str | None, ...]:
        """Logical axes of an array."""
        return self.spec.axes if self.is_wide(name) else self.spec.axes[:-1]

    def at(self, name: str, rows: Any) -> tuple[Any, ...]:
        """Index of rows in an array."""
        return (..., rows, slice(None)) if self.is_wide(name) else (..., rows)


def on_host(config: RunConfig) -> bool:
    """Whether any layer keeps its table in host memory."""
    return any(isinstance(node, Engram) and node.table_on == "host" for _, node in walk(config.model.stack))


def num_hosts(config: RunConfig, rules: Rules) -> int:
    """Parts in which a run's tables in host memory are split.

    Raises:
        UserError: there are such tables, and the processes do not hold equal parts.
    """
    return parts_of(rules).count if on_host(config) else 1


def residents(config: RunConfig, specs: LM, hosts: int = 1) -> list[Resident]:
    """The tables that layers of the model keep in host memory.

    Args:
        specs: the described model, its tables whole.
        hosts: parts in which they are split.
    """
    tokens = config.data.batch_size * config.data.sequence_length
    own = assigned(config.optimizer.table_optimizers, partition(specs)[0])
    known, found = dict(named_leaves(specs)), []
    is_layer = lambda node: isinstance(node, EngramMixer)  # noqa: E731
    for path, node in jax.tree_util.tree_flatten_with_path(specs, is_leaf=is_layer)[0]:
        if isinstance(node, EngramMixer) and node.config.table_on == "host":
            parameter = f"{path_name(path)}.table"
            held = -(-tokens * node.config.num_tables // ROW_MULTIPLE) * ROW_MULTIPLE
            found.append(Resident(parameter, node.config.name, known[parameter], held, own.get(parameter), hosts))
    return found


def host_table_problems(config: RunConfig, specs: LM) -> Iterator[Problem]:
    """What a run with tables in host memory cannot do."""
    for one in residents(config, specs):
        layer = f"{one.parameter}, in host memory,"
        if one.optimizer is None or not one.optimizer.lazy:
            what = "none" if one.optimizer is None else type(one.optimizer).__name__
            rule = f"updates {layer} from a dense gradient, which no device could hold"
            ways_out = f"add LazyAdam(names={one.parameter!r}), or RowwiseAdagrad, or keep it on the device"
            yield Problem("optimizer.tables", what, rule, ways_out)
        if one.held >= one.spec.shape[-2]:
            rule = f"lets a batch read {one.held:,} rows of {layer} which has {one.spec.shape[-2]:,}: all of it would travel"
            yield Problem("data.batch_size", config.data.batch_size, rule, "use fewer tokens a batch, or table_on='device'")
        if config.sample.tokens:
            rule = f"needs the whole of {layer} on the device"
            yield Problem("sample.tokens", config.sample.tokens, rule, "use 0; `mlt generate` draws from the checkpoints")
        if config.train.distill is not None:
            yield Problem(
                "train.distill", config.train.distill.teacher, f"is not there with {layer} yet", "use table_on='device'"
            )


def moving_bytes(tables: list[Resident], rules: Rules) -> int:
    """Bytes of a device for rows on their way, beside those of the train state."""
    return sum(one.buffer_bytes - one.nbytes(one.room) for one in tables) // rules.size("memory")


def check_host_memory(tables: list[Resident], limit: int | None = None) -> None:
    """Refuse tables that the host cannot hold, or not while a checkpoint is taken.

    Args:
        tables: what `residents` gives.
        limit: bytes of the host; None asks it.

    Raises:
        UserError: with the bytes of each table, its optimizer state included.
    """
    limit = machine_bytes() if limit is None else limit
    needed = sum(one.host_bytes for one in tables)
    if SAVING_COPIES * needed <= limit:
        return
    gib = lambda size: f"{size / 2**30:,.2f} GiB"  # noqa: E731
    each = ", ".join(f"{one.parameter} {gib(one.host_bytes)} ({one.own_rows:,} rows)" for one in tables)
    most = gib(SAVING_COPIES * needed)
    raise UserError(
        f"tables in host memory take {gib(needed)} of each process with their optimizers' state, and {most} while a checkpoint "
        f"is taken; this machine has {gib(limit)}: {each}. Use fewer rows_per_head, RowwiseAdagrad, which keeps one number a "
        "row, more processes along mesh.fsdp, each of which holds a part, or table_on='device'"
    )


def check_parts(tables: list[Resident]) -> None:
    """Refuse parts so small that all of each would travel, and more room than the ids of a batch count.

    Raises:
        UserError: with the rows of a batch and of a part.
    """
    for one in tables:
        if one.hosts > 1 and not one.held < one.own_rows:
            raise UserError(
                f"a batch can read {one.held:,} rows of {one.parameter}, in host memory, and each of {one.hosts} hosts holds "
                f"{one.own_rows:,}: all of them would travel. Use fewer tokens a batch, or table_on='device'"
            )
        if one.room > MOST_LOCAL_ROWS:
            raise UserError(
                f"a batch needs room for {one.room:,} rows of {one.parameter} on the devices, {one.held:,} for each of "
                f"{one.hosts} hosts; ids count {MOST_LOCAL_ROWS:,}. Use fewer tokens a batch"
            )


def on_devices(config: RunConfig, specs: LM, hosts: int = 1) -> LM:
    """The described model as the devices hold it: resident tables have the rows of a batch."""
    found = residents(config, specs, hosts)
    smaller = {one.parameter: dataclasses.replace(one.spec, shape=one.shapes(one.room)[TABLE]) for one in found}
    return with_leaves(specs, smaller) if smaller else specs


def with_leaves(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """The tree with other leaves in the place of the named ones."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaves.get(path_name(path), leaf), tree)
