"""What cannot be of tables: optimizers that match none, and more rows on one owner than it addresses."""

from collections.abc import Iterator
from typing import Any

from mlt.config.problems import Problem
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
