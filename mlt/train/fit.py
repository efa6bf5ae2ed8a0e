"""Refuses a train state that its devices cannot hold, before any of it is made or compiled."""

from collections.abc import Iterator
from typing import Any

import jax

from mlt.data.config import DataConfig
from mlt.errors import UserError
from mlt.nn.param import named_leaves, partition
from mlt.parallel.memory import bytes_on_device, device_limit, machine_bytes
from mlt.parallel.rules import Rules
from mlt.report.text import byte_size

TOKEN_BYTES = 20
"""Of a token in a batch: itself, its target, document, position and weight."""


def check_fits(
    abstract: Any,
    specs: Any,
    rules: Rules,
    limit: int | None = None,
    *,
    besides: int = 0,
    lazy: tuple[str, ...] | None = None,
) -> None:
    """Refuse a state that does not fit.

    What counts is what every step holds at once, whatever the compiler does: the state, and dense gradients of tables, which
    are float32 and all there before the guard lets one of them be applied. Other gradients and activations come on top, and
    how much of them is there at once is the compiler's business; so nothing is refused that could run.

    Args:
        abstract: the train state's shapes and shardings.
        specs: described parameters.
        limit: bytes of a device; None asks the devices. Where none of this process says, nothing is refused.
        besides: bytes of a device for rows of tables in host memory that are on their way.
        lazy: names of the tables that get no dense gradient; those of the others count. None counts none.

    Raises:
        UserError: with bytes of a device by group, and ways out.
    """
    if limit is None and isinstance(rules.mesh, jax.sharding.Mesh):
        limit = device_limit(rules.mesh.local_devices)
    groups = _groups(abstract, specs, besides, lazy)
    needed = sum(groups.values())
    if limit is None or needed <= limit:
        return
    parts = "".join(f"\n  {byte_size(size):>10}  {name}" for name, size in groups.items() if size)
    ways_out = "".join(f"\n  {line}" for line in _ways_out(groups, specs, rules, limit))
    raise UserError(
        f"the train state does not fit: it takes at least {byte_size(needed)} of each device, which has {byte_size(limit)}"
        f"{parts}\nactivations come on top, and up to {byte_size(groups['parameters'])} of other gradients. Ways out:{ways_out}"
    )


def check_batches(data: DataConfig, processes: int = 1, limit: int | None = None) -> None:
    """Refuse batches that the machine cannot hold as often as the loader prepares them.

    Args:
        processes: that share the rows of a batch.
        limit: bytes of the machine; None asks it.

    Raises:
        UserError: with the bytes of a batch and of all that are held at once.
    """
    limit = machine_bytes() if limit is None else limit
    one = -(-data.batch_size // processes) * data.sequence_length * TOKEN_BYTES
    held = 1 + data.prefetch_batches
    if one * held > limit:
        raise UserError(
            f"data.batch_size = {data.batch_size:,} rows of {data.sequence_length:,} tokens are {byte_size(one)} a batch in this "
            f"process, and {held} are held at once; this machine has {byte_size(limit)}. Use fewer rows or tokens, or a smaller "
            f"data.prefetch_batches than {data.prefetch_batches}"
        )


def _groups(abstract: Any, specs: Any, besides: int, lazy: tuple[str, ...] | None) -> dict[str, int]:
    """Bytes of a device by what takes them."""
    trained, buffers = partition(abstract.model)
    parameters, places = dict(named_leaves(trained)), dict(named_leaves(specs))
    tables = {name for name in parameters if places[name].group == "table"}
    dense = tables - set(lazy) if lazy is not None else set()
    rest = _bytes(abstract) - _bytes(abstract.model) - _bytes(abstract.optimizer)
    return {
        "parameters": sum(bytes_on_device(leaf) for name, leaf in parameters.items() if name not in tables),
        "parameters of tables": sum(bytes_on_device(parameters[name]) for name in tables),
        "gradients of tables that are not updated by rows": sum(bytes_on_device(parameters[name]) for name in dense),
        "state of the optimizer": _bytes(abstract.optimizer),
        "rows of tables in host memory, on their way": besides,
        "buffers": _bytes(buffers) + rest,
    }


def _ways_out(groups: dict[str, int], specs: Any, rules: Rules, limit: int) -> Iterator[str]:
    """What makes a state smaller, the surest first."""
    shards = rules.size("memory")
    if shards > 1 and rules.zero < 3:
        yield f"mesh.zero=3, which splits the parameters too; it is {rules.zero}"
    else:
        cpus = isinstance(rules.mesh, jax.sharding.Mesh) and rules.mesh.devices.flat[0].platform == "cpu"
        where = "machines" if cpus else "devices"
        yield f"mesh.fsdp={-(-sum(groups.values()) * shards // limit)} or more, over as many {where}; it is {shards}"
    tables = [spec for _, spec in named_leaves(specs) if spec.group == "table"]
    if tables:
        rows = sum(spec.size // spec.shape[-1] for spec in tables)
        yield f"fewer rows of tables than {rows:,}, or optimizer.tables=RowwiseAdagrad(): one number a row, and no such gradient"
    if groups["rows of tables in host memory, on their way"]:
        yield "fewer tokens a batch, which bring fewer rows"
    if groups["state of the optimizer"] > groups["parameters"] / 2:
        yield "an optimizer that remembers less: Adafactor keeps almost nothing, Muon one value a parameter of its matrices"
    yield "a smaller model"
    yield "train.check_memory=false, to try it all the same"


def _bytes(tree: Any) -> int:
    return sum(map(bytes_on_device, jax.tree.leaves(tree)))
