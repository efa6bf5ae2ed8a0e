"""Bytes that the state of a run takes: of a device, and in the memory of a host where tables lie there."""

from typing import Any

from mlt.config.run import RunConfig
from mlt.model.lm import LM
from mlt.nn.param import named_leaves, partition
from mlt.optim.table import TableOptimizer, assigned
from mlt.train.residents import SAVING_COPIES, residents


def device_bytes(config: RunConfig, specs: LM, hosts: int = 1) -> float:
    """Bytes of parameters, gradients and optimizer state on a device, all float32.

    The run's optimizer counts as AdamW, with two moments. A table with an optimizer of its own has that one's state, and a
    gradient only where it is not updated by rows; one in host memory has the buffers of `HostTables` here and nothing else.

    Args:
        specs: the described model, every table whole.
        hosts: parts in which tables in host memory are split.
    """
    mesh = config.mesh
    trained = partition(specs)[0]
    own = assigned(config.optimizer.table_optimizers, trained)
    away = {one.parameter: one for one in residents(config, specs, hosts)}
    dense, tables = 0, 0.0
    for name, spec in named_leaves(trained):
        if spec.group != "table":
            dense += spec.size
        elif name in away:
            tables += away[name].buffer_bytes
        else:
            tables += spec.size // spec.shape[-1] * _row_bytes(own.get(name), spec.shape[-1])
    split = [mesh.fsdp if mesh.zero >= stage else 1 for stage in (3, 2, 1, 1)]
    return sum(4 * dense / mesh.tensor / parts for parts in split) + tables / mesh.fsdp


def memory_lines(config: RunConfig, specs: LM, hosts: int = 1) -> list[str]:
    """What tables in host memory take of each process; no line where there are none."""
    found = residents(config, specs, hosts)
    if not found:
        return []
    held = sum(one.host_bytes for one in found) / 2**20
    split = f", over {hosts} hosts" if hosts > 1 else ""
    return [
        f"{held:,.1f} MiB of each process for tables and their optimizers' state{split}; "
        f"{SAVING_COPIES * held:,.1f} MiB while a checkpoint is taken"
    ]


def _row_bytes(optimizer: TableOptimizer | None, width: int) -> int:
    """Of a row with its gradient and its state."""
    if optimizer is None:
        return 4 * 4 * width
    slots: dict[str, Any] = optimizer.slots()
    return 4 * (width * (1 + (not optimizer.lazy)) + sum(width if wide else 1 for wide in slots.values()))
