"""What the plan says of sparse tables: how lookups cross owners, in bytes, and which optimizer updates which table."""

from collections.abc import Iterator
from typing import Any

from mlt.config.run import RunConfig
from mlt.mixers.channel.engram import Engram
from mlt.model.lm import LM
from mlt.nn.param import partition
from mlt.optim.table import assigned
from mlt.parallel import table


def table_lines(config: RunConfig, specs: LM) -> list[str]:
    """One line for each kind of lookup where tables have several owners, and for each table with an optimizer of its own."""
    lookups = [f"{name}: {how}" for name, how in dict(_crossings(config)).items()]
    own = assigned(config.optimizer.table_optimizers, partition(specs)[0])
    updates = [f"{name}: {type(optimizer).__name__}" + " by rows" * optimizer.lazy for name, optimizer in own.items()]
    return lookups + updates


def _crossings(config: RunConfig) -> Iterator[tuple[str, str]]:
    shards = config.mesh.fsdp
    if shards == 1:
        return
    tokens = config.data.batch_size * config.data.sequence_length
    tokens //= config.train.grad_accumulation * config.mesh.batch_shards * config.mesh.context
    for mixer in config.model.stack.mixers():
        if mixer.op == "row_lookup":
            shape = {**_reads(mixer, config.model.d_model), "tokens": tokens, "shards": shards}
            received = {name: table.sent_bytes(name, **shape) / 2**20 for name in table.STRATEGIES}
            taken = table.choose(**shape)
            others = ", ".join(f"{name} {size:,.2f}" for name, size in received.items() if name != taken)
            yield type(mixer).__name__, f"{taken}, {received[taken]:,.2f} MiB received by a device in a lookup (by {others})"


def _reads(mixer: Any, d_model: int) -> dict[str, Any]:
    if isinstance(mixer, Engram):
        return {"slots": mixer.num_tables, "width": mixer.head_dim, "rows": mixer.tables.num_rows, "pooled": False}
    rows = mixer.num_rows if hasattr(mixer, "num_rows") else mixer.num_experts
    width = getattr(mixer, "value_dim", None) or d_model
    return {"slots": mixer.num_heads * mixer.num_selected, "width": width, "rows": rows, "pooled": True}
