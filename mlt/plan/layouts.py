"""Layouts of a config on so many devices: which can run, and which of them to try first."""

import dataclasses
import itertools
from collections.abc import Iterator

from mlt.config.check import check_run
from mlt.config.problems import ConfigError
from mlt.config.run import RunConfig
from mlt.mixers.channel.moe import MoE
from mlt.parallel.mesh import AXES, Layout
from mlt.plan.devices import Pool
from mlt.plan.forecast import Forecast, forecast

MOST = 16
"""Layouts that are forecast in one search; the others are not named."""


def with_layout(config: RunConfig, layout: Layout) -> RunConfig:
    return config.replace(mesh=layout)


def candidates(config: RunConfig, pool: Pool) -> Iterator[Layout]:
    """Layouts with as many devices that could make sense, the simplest first.

    Tensor shards stay among devices that fast links join; experts and sequences are split where the model has experts and rows
    are long; copies are only of what `fsdp` splits over at least one group of neighbours.
    """
    count, near = pool.count, pool.device.near
    experts = max((m.num_experts for m in config.model.stack.mixers() if isinstance(m, MoE)), default=1)
    shards = [n for n in range(1, count + 1) if count % n == 0]
    found = []
    for tensor, context, expert, replica in itertools.product(shards, shards, shards, shards):
        rest = count // (tensor * context * expert * replica)
        if tensor * context * expert * replica * rest != count:
            continue
        if tensor > min(near, 8) or experts % expert or (expert > 1 and experts == 1):
            continue
        if context > 1 and config.data.sequence_length // context < 1024:
            continue
        if replica > 1 and rest * expert * context * tensor < min(near, count):
            continue
        if config.data.batch_size % (replica * rest * expert):
            continue
        sizes = dict(zip(AXES, (replica, rest, expert, context, tensor), strict=True))
        axes = sum(n > 1 for n in sizes.values())
        found.append(((axes, tensor, context, expert, replica), sizes))
    for _, sizes in sorted(found, key=lambda one: one[0]):
        yield config.mesh.replace(**sizes)


def legal(config: RunConfig) -> bool:
    """Whether the config can run."""
    try:
        check_run(config)
    except ConfigError:
        return False
    return True


def search(config: RunConfig, pool: Pool) -> list[Forecast]:
    """Forecasts of up to `MOST` layouts that can run: those that fit with room first, the fastest first among
    them, half way between all and nothing overlapping."""
    runs = (with_layout(config, layout) for layout in candidates(config, pool))
    found = [forecast(run, pool) for run in itertools.islice(filter(legal, runs), MOST)]
    return sorted(found, key=_rank)


def _rank(one: Forecast) -> tuple[bool, bool, float]:
    return not one.fits, one.is_tight, one.least_seconds + one.most_seconds if one.fits else one.nbytes


@dataclasses.dataclass(frozen=True)
class Change:
    """A change of a config, and what it makes of the forecast."""

    sets: str
    forecast: Forecast


def ways_out(config: RunConfig, pool: Pool) -> Iterator[Change]:
    """Changes that leave the mesh as it is and make the step smaller, one at a time and together, as far as they are legal."""
    smaller = config.train.replace(grad_accumulation=2 * config.train.grad_accumulation)
    recompute = config.remat.replace(mode="sub_layer", save=(), offload=())
    changes = {f"train.grad_accumulation={smaller.grad_accumulation}": config.replace(train=smaller)}
    if config.remat != recompute:
        changes["remat.mode=sub_layer"] = config.replace(remat=recompute)
        changes[" ".join(changes)] = config.replace(train=smaller, remat=recompute)
    for sets, changed in changes.items():
        if legal(changed):
            yield Change(sets, forecast(changed, pool))
