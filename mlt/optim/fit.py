"""What cannot be: table optimizers that match nothing, shared tables without dense gradients, tables that no device holds."""

from collections.abc import Iterator
from typing import Any

import jax

from mlt.config.problems import Problem
from mlt.errors import UserError
from mlt.nn.param import named_leaves
from mlt.optim.table import TableOptimizer, assigned
from mlt.parallel.rules import Rules
from mlt.parallel.table import MOST_LOCAL_ROWS

SHARED = "shared"


def table_problems(optimizers: tuple[TableOptimizer, ...], specs: Any) -> Iterator[Problem]:
    """Broken rules between the settings of tables and the tables there are, with paths relative to the optimizer.

    Args:
        specs: described trained parameters.
    """
    tables = [name for name, spec in named_leaves(specs) if spec.group == "table"]
    own = assigned(optimizers, specs)
    for optimizer in optimizers:
        if optimizer not in own.values():
            rule = f"matches no table that is not already taken; the tables are {', '.join(tables) or 'none'}"
            yield Problem("tables.names", optimizer.names, rule, "change the pattern or its place")
    shared = [name for name, optimizer in own.items() if optimizer.lazy and SHARED in name.split(".")]
    if shared:
        rule = f"is updated by rows, and several layers read {', '.join(shared)}: the records of one layer belong to one table"
        yield Problem("tables", ", ".join(type(own[name]).__name__ for name in shared), rule, "use DenseAdam for it")


def too_long(specs: Any, rules: Rules) -> Iterator[Problem]:
    """Tables with more rows on one owner than 32 bits address, with paths relative to the run."""
    shards = rules.size("memory")
    for name, spec in named_leaves(specs):
        rows = spec.size // spec.shape[-1] // shards if spec.group == "table" else 0
        if rows > MOST_LOCAL_ROWS:
            rule = f"gives each owner {rows:,} rows of {name}; one addresses {MOST_LOCAL_ROWS:,}"
            yield Problem("mesh.fsdp", shards, rule, f"use {-(-rows * shards // MOST_LOCAL_ROWS)} or more")


def check_fits(abstract: Any, specs: Any, rules: Rules, limit: int | None = None) -> None:
    """Refuse a state whose tables do not fit before any of it is made.

    Args:
        abstract: the train state's shapes and shardings.
        specs: described parameters.
        limit: bytes of a device; None asks the devices, and where they do not say nothing is refused.

    Raises:
        UserError: with bytes per device of state and tables, and how many shards would do.
    """
    if limit is None:
        devices = rules.mesh.local_devices if isinstance(rules.mesh, jax.sharding.Mesh) else []
        limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
        limit = min((n for n in limits if n), default=None)
    state = sum(_bytes_on_device(leaf) for leaf in jax.tree.leaves(abstract))
    tables = [spec for _, spec in named_leaves(specs) if spec.group == "table"]
    if limit is None or state <= limit or not tables:
        return
    rows = sum(spec.size // spec.shape[-1] for spec in tables)
    parameters = sum(spec.nbytes for spec in tables)
    shards = rules.size("memory")
    raise UserError(
        f"the train state takes {state / 2**30:,.2f} GiB of each device, which has {limit / 2**30:,.2f} GiB; its "
        f"{len(tables)} tables hold {rows:,} rows, {parameters / 2**30:,.2f} GiB before optimizer state, over "
        f"mesh.fsdp = {shards} owners: use more owners, fewer rows, or tables=RowwiseAdagrad(), which keeps one number a row"
    )


def _bytes_on_device(leaf: jax.ShapeDtypeStruct) -> int:
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    size = leaf.dtype.itemsize
    for n in shape:
        size *= n
    return size
