"""What the plan says of sparse tables: how lookups cross owners, in bytes, and which optimizer updates which table."""

from collections.abc import Iterator
from typing import Any

from mlt.config.run import RunConfig
from mlt.mixers.channel.engram import Engram
from mlt.mixers.channel.hierarchical_memory import HierarchicalMemory
from mlt.mixers.sequence.value_embeddings import LaVEAttention, MoVEAttention
from mlt.model.float8_tables import float8_names
from mlt.model.lm import LM
from mlt.nn.float8 import stored_bytes
from mlt.nn.param import ParamSpec, named_leaves, partition
from mlt.optim.table import assigned
from mlt.parallel import table
from mlt.train.residents import Resident, residents


def table_lines(config: RunConfig, specs: LM, hosts: int = 1) -> list[str]:
    """One line for each kind of lookup where tables have several owners, and for each table with an optimizer of its own."""
    lookups = [f"{name}: {how}" for name, how in dict(_crossings(config)).items()]
    own = assigned(config.optimizer.table_optimizers, partition(specs)[0])
    updates = [f"{name}: {type(optimizer).__name__}" + " by rows" * optimizer.lazy for name, optimizer in own.items()]
    in_8_bits = [_exported(name, spec) for name, spec in named_leaves(specs) if name in float8_names(config.model)]
    return lookups + updates + in_8_bits + [_resident(one) for one in residents(config, specs, hosts)]


def _exported(name: str, spec: ParamSpec) -> str:
    rows, width = spec.size // spec.shape[-1], spec.shape[-1]
    held, written = spec.nbytes / 2**20, stored_bytes(rows, width) / 2**20
    where = "in exports and mlt generate"
    return f"{name}: read in 8 bits; {held:,.1f} MiB of float32 rows in training, {written:,.1f} MiB with scales {where}"


def _resident(one: Resident) -> str:
    moved = one.nbytes(one.held) / 2**20
    copies = f" of each of {one.hosts} hosts" if one.hosts > 1 else ""
    return f"{one.parameter}: in host memory; room for {one.held:,} rows{copies} on the devices, {moved:,.1f} MiB each way a step"


def _crossings(config: RunConfig) -> Iterator[tuple[str, str]]:
    shards = config.mesh.fsdp
    if shards == 1:
        return
    tokens = config.data.batch_size * config.data.sequence_length
    tokens //= config.train.grad_accumulation * config.mesh.batch_shards * config.mesh.context
    rows = tokens * config.mesh.context // config.data.sequence_length
    for mixer in config.model.stack.mixers():
        reads = _reads(mixer, config.model.d_model, rows)
        if reads is not None:
            shape = {"tokens": tokens, **reads, "shards": shards}
            received = {name: table.sent_bytes(name, **shape) / 2**20 for name in table.STRATEGIES}
            taken = table.choose(**shape)
            others = ", ".join(f"{name} {size:,.2f}" for name, size in received.items() if name != taken)
            yield type(mixer).__name__, f"{taken}, {received[taken]:,.2f} MiB received by a device in a lookup (by {others})"


def _reads(mixer: Any, d_model: int, batch_rows: int) -> dict[str, Any] | None:
    """What a mixer's lookup reads; None where it has none."""
    if isinstance(mixer, Engram):
        return {"slots": mixer.num_tables, "width": mixer.head_dim, "rows": mixer.tables.num_rows, "pooled": False}
    if isinstance(mixer, LaVEAttention | MoVEAttention):
        width = mixer.table_width
        return {"slots": 1, "width": width, "rows": mixer.vocab_size, "pooled": False} if width else None
    if isinstance(mixer, HierarchicalMemory):
        read = {"slots": mixer.fetched_units, "width": 3 * d_model, "rows": mixer.num_rows, "pooled": False}
        return {**read, "tokens": batch_rows * (mixer.max_runs + 1)}
    if mixer.op != "row_lookup":
        return None
    rows = mixer.num_rows if hasattr(mixer, "num_rows") else mixer.num_experts
    width = getattr(mixer, "value_dim", None) or d_model
    return {"slots": mixer.num_heads * mixer.num_selected, "width": width, "rows": rows, "pooled": True}
