"""Tables that a run keeps in host memory: which, of what size, and what cannot be done with them."""

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from mlt.config.problems import Problem
from mlt.config.run import RunConfig
from mlt.errors import UserError
from mlt.mixers.channel.engram import ROW_MULTIPLE, EngramMixer
from mlt.model.lm import LM
from mlt.nn.param import ParamSpec, named_leaves, partition, path_name
from mlt.optim.table import TableOptimizer, assigned
from mlt.parallel.rules import Rules

TABLE = ""
"""Among the names of a table's arrays, the table's own; the others are slots of its optimizer."""


@dataclasses.dataclass(frozen=True)
class Resident:
    """One table in host memory.

    Attributes:
        parameter: its name in the model.
        layer: the name of its rows in a batch.
        spec: as the model describes it.
        held: rows on the devices.
        optimizer: what updates it.
    """

    parameter: str
    layer: str
    spec: ParamSpec
    held: int
    optimizer: TableOptimizer | None

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

    def places(self, rules: Rules) -> dict[str, Any]:
        """Shardings of the rows on the devices."""
        axes = self.spec.axes
        return {name: rules.sharding(axes if self.is_wide(name) else axes[:-1]) for name in (TABLE, *self.slots())}

    def at(self, name: str, rows: Any) -> tuple[Any, ...]:
        """Index of rows in an array."""
        return (..., rows, slice(None)) if self.is_wide(name) else (..., rows)


def residents(config: RunConfig, specs: LM) -> list[Resident]:
    """The tables that layers of the model keep in host memory.

    Args:
        specs: the described model, its tables whole.
    """
    tokens = config.data.batch_size * config.data.sequence_length
    own = assigned(config.optimizer.table_optimizers, partition(specs)[0])
    known, found = dict(named_leaves(specs)), []
    is_layer = lambda node: isinstance(node, EngramMixer)  # noqa: E731
    for path, node in jax.tree_util.tree_flatten_with_path(specs, is_leaf=is_layer)[0]:
        if isinstance(node, EngramMixer) and node.config.table_on == "host":
            parameter = f"{path_name(path)}.table"
            held = -(-tokens * node.config.num_tables // ROW_MULTIPLE) * ROW_MULTIPLE
            found.append(Resident(parameter, node.config.name, known[parameter], held, own.get(parameter)))
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


def check_host_memory(tables: list[Resident], limit: int | None = None) -> None:
    """Refuse tables that the host cannot hold.

    Args:
        tables: what `residents` gives.
        limit: bytes of the host; None asks it.

    Raises:
        UserError: with the bytes of each table, its optimizer state included.
    """
    limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if limit is None else limit
    sizes = {one.parameter: one.nbytes(one.spec.shape[-2]) for one in tables}
    if sum(sizes.values()) <= limit:
        return
    each = ", ".join(f"{one.parameter} {sizes[one.parameter] / 2**30:,.2f} GiB ({one.spec.shape[-2]:,} rows)" for one in tables)
    raise UserError(
        f"tables in host memory take {sum(sizes.values()) / 2**30:,.2f} GiB with their optimizers' state, and this machine has "
        f"{limit / 2**30:,.2f} GiB: {each}. Use fewer rows_per_head, RowwiseAdagrad, which keeps one number a row, or "
        "table_on='device' over more mesh.fsdp owners. (While a checkpoint is written there is a second copy.)"
    )


def on_devices(config: RunConfig, specs: LM) -> LM:
    """The described model as the devices hold it: resident tables have the rows of a batch."""
    found = residents(config, specs)
    smaller = {one.parameter: dataclasses.replace(one.spec, shape=one.shapes(one.held)[TABLE]) for one in found}
    return with_leaves(specs, smaller) if smaller else specs


def with_leaves(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """The tree with other leaves in the place of the named ones."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaves.get(path_name(path), leaf), tree)
