"""What cannot be: table optimizers that match nothing, and tables that no device holds."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from mlt.config.problems import Problem
from mlt.errors import UserError
from mlt.nn.param import named_leaves
from mlt.optim.table import TableOptimizer, assigned
from mlt.parallel.rules import Rules
from mlt.parallel.table import MOST_LOCAL_ROWS


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


def too_long(specs: Any, rules: Rules) -> Iterator[Problem]:
    """Tables with more rows on one owner than 32 bits address, with paths relative to the run."""
    shards = rules.size("memory")
    for name, spec in named_leaves(specs):
        rows = spec.size // spec.shape[-1] // shards if spec.group == "table" else 0
        if rows > MOST_LOCAL_ROWS:
            rule = f"gives each owner {rows:,} rows of {name}; one addresses {MOST_LOCAL_ROWS:,}"
            yield Problem("mesh.fsdp", shards, rule, f"use {-(-rows * shards // MOST_LOCAL_ROWS)} or more")


def check_fits(
    abstract: Any,
    specs: Any,
    rules: Rules,
    limit: int | None = None,
    *,
    besides: int = 0,
    lazy: tuple[str, ...] | None = None,
) -> None:
    """Refuse a state whose tables do not fit before any of it is made.

    Args:
        abstract: the train state's shapes and shardings.
        specs: described parameters.
        limit: bytes of a device; None asks the devices. CPU devices share the machine's. On a mesh without devices of this
            process, and where others do not say, nothing is refused.
        besides: bytes of a device for rows of tables in host memory that are on their way.
        lazy: names of the tables that get no dense gradient; those of the others count. None counts none.

    Raises:
        UserError: with bytes per device of state and tables, and how many shards would do.
    """
    if limit is None:
        devices = rules.mesh.local_devices if isinstance(rules.mesh, jax.sharding.Mesh) else []
        limit = min((size for size in map(_bytes_of, devices) if size), default=None)
    named = {name: spec for name, spec in named_leaves(specs) if spec.group == "table"}
    dense = set() if lazy is None else {name for name, spec in named.items() if spec.trainable and name not in lazy}
    gradients = sum(_bytes_on_device(leaf) for name, leaf in named_leaves(abstract.model) if name in dense)
    state = sum(_bytes_on_device(leaf) for leaf in jax.tree.leaves(abstract)) + besides + gradients
    tables = list(named.values())
    if limit is None or state <= limit or not tables:
        return
    rows = sum(spec.size // spec.shape[-1] for spec in tables)
    parameters = sum(spec.nbytes for spec in tables)
    shards = rules.size("memory")
    moving, with_gradients = "", ""
    if besides:
        moving = f", {besides / 2**30:,.2f} GiB of it for rows of tables in host memory, fewer with fewer tokens a batch"
    if gradients:
        with_gradients = f" with {gradients / 2**30:,.2f} GiB of gradients of tables"
    raise UserError(
        f"the train state{with_gradients} takes {state / 2**30:,.2f} GiB of each device, which has "
        f"{limit / 2**30:,.2f} GiB{moving}; its {len(tables)} tables hold {rows:,} rows, {parameters / 2**30:,.2f} GiB before "
        f"optimizer state, over mesh.fsdp = {shards} owners: use more owners, fewer rows, or tables=RowwiseAdagrad(), which "
        "keeps one number a row and makes no gradient of a table's size"
    )


def machine_bytes() -> int:
    """Bytes of this machine, or of the part of it that this process may use (control groups, version 2)."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        allowed = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return whole
    return min(whole, int(allowed)) if allowed.isdigit() else whole


def _bytes_of(device: jax.Device) -> int | None:
    """Bytes that a device of this process may hold; None where it does not say."""
    if device.platform == "cpu":
        return machine_bytes() // jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit")


def _bytes_on_device(leaf: jax.ShapeDtypeStruct) -> int:
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    size = leaf.dtype.itemsize
    for n in shape:
        size *= n
    return size
