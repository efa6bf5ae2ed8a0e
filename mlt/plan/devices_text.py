"""What `mlt plan` prints: one layout in full, several in a table, or all of it as JSON."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from mlt.config.check import check_run
from mlt.config.run import RunConfig
from mlt.errors import UserError
from mlt.parallel.mesh import Layout
from mlt.plan.collectives import summary
from mlt.plan.compiled import Compiled, compile_step
from mlt.plan.devices import USABLE, parse_pool
from mlt.plan.forecast import MOST_OVER, Forecast, forecast
from mlt.plan.layouts import Change, search, ways_out
from mlt.report.text import byte_size

HIDDEN_BYTES = 2**20
"""Crossings of fewer bytes are not listed."""


def plan_devices(
    config: RunConfig, devices: str, *, layouts: int | None = None, as_json: bool = False, compiled: bool = False
) -> tuple[str, bool]:
    """A plan of a config for devices that need not be there, and whether it fits.

    Args:
        devices: such as "64xH200".
        layouts: how many layouts to list; None plans the config's own mesh, or where that is one device, the best there is.
        as_json: for programs.
        compiled: also compile the step of the layout shown (`plan/compiled.py`).

    Raises:
        ConfigError: every problem of the config.
        UserError: unknown devices, a mesh of another number of them, or no layout that can run.
    """
    pool = parse_pool(devices)
    own = config.mesh.num_devices
    if own not in (1, pool.count):
        raise UserError(
            f"mesh: {shown(config.mesh)} makes {own} devices, and --devices names {pool.count}; "
            "give the mesh as many, or leave it out (every axis 1) to have layouts tried"
        )
    if layouts is None and own == pool.count:
        check_run(config)
        found = [forecast(config, pool)]
    else:
        found = search(config, pool)
        if not found:
            raise UserError(
                f"no layout over {pool} can run: data.batch_size = {config.data.batch_size} rows and the sizes of the model "
                "divide by none; `mlt check` with --set mesh.fsdp=N says what stands against one"
            )
    best = found[0]
    config = config.replace(mesh=best.layout)
    changes = [] if best.fits else list(ways_out(config, pool))
    exact = compile_step(config, pool) if compiled else None
    if as_json:
        told = {"layouts": [facts(one) for one in found[:layouts]], "ways_out": _changes(changes)}
        told |= {} if exact is None else {"compiled": {"arguments": exact.arguments, "temporary": exact.temporary}}
        return json.dumps(told, indent=1) + "\n", best.fits
    lines = [*_table(found[:layouts])] if layouts is not None or len(found) > 1 else []
    lines += [*text(best), *_compiled(exact, best), *_ways_out(changes, best)]
    return "\n".join(lines) + "\n", best.fits


def shown(layout: Layout) -> str:
    return " ".join(f"{axis}={size}" for axis, size in layout.shape().items() if size > 1) or "one device"


def text(one: Forecast) -> Iterator[str]:
    """One layout in full."""
    device = one.pool.device
    sizes = f"{byte_size(device.memory)} each, of which {USABLE:.0%} is for arrays: {byte_size(device.usable)}"
    yield f"devices      {one.pool}, {sizes}"
    yield f"layout       {shown(one.layout)}"
    for i, (name, size) in enumerate(one.classes.items()):
        yield f"{'memory' if i == 0 else '':<12} {byte_size(size):>10}  {name}"
    yield f"{'':<12} {byte_size(one.nbytes):>10}  of each device at the fullest moment ({one.moment}): {_verdict(one)}"
    yield (
        f"compute      {_flops(one.flops)} of a device a step, {one.flops / max(one.model_flops, 1):.2f} times its "
        f"share of the model's; {seconds(one.compute_seconds)} at the device's rates"
    )
    for i, crossing in enumerate(c for c in one.crossings if c.nbytes >= HIDDEN_BYTES):
        where = f"over {' x '.join(crossing.axes)} ({crossing.over})" if crossing.axes else "and its memory"
        size, time = byte_size(crossing.nbytes), seconds(crossing.seconds)
        yield f"{'crosses' if i == 0 else '':<12} {size:>10}  {crossing.kind} {where}: {time}"
    fast, slow = one.least_seconds, one.most_seconds
    yield (
        f"step         no faster than {seconds(fast)} if everything overlaps, {seconds(slow)} if nothing does: "
        f"{one.tokens / fast:,.0f} to {one.tokens / slow:,.0f} tokens/s, MFU {one.utilization(fast):.0%} to "
        f"{one.utilization(slow):.0%}; bound by {'collectives' if one.crossing_seconds > one.compute_seconds else 'compute'}"
    )
    for what in one.unknown:
        yield f"not counted  {what}"


def _compiled(exact: Compiled | None, best: Forecast) -> Iterator[str]:
    """What the compiler itself allots, beside what was forecast."""
    if exact is None:
        return
    beside, total = best.nbytes - best.state_bytes, exact.arguments + exact.temporary
    share = exact.temporary / max(beside, 1)
    yield (
        f"compiled     {byte_size(total):>10}  of each device by XLA for {best.pool.device.name} in {exact.seconds:.0f} s: "
        f"{byte_size(exact.temporary)} beside the state, {share:.2f} of the forecast's {byte_size(beside)}"
    )
    for line in summary(list(exact.sent)).splitlines():
        yield f"             {line}"


def facts(one: Forecast) -> dict[str, Any]:
    """One layout for programs: bytes, seconds and FLOPs of a device."""
    return {
        "devices": str(one.pool),
        "layout": {axis: n for axis, n in one.layout.shape().items() if n > 1},
        "bytes": one.classes,
        "total_bytes": one.nbytes,
        "usable_bytes": one.pool.device.usable,
        "fits": one.fits,
        "tight": one.is_tight,
        "fullest_moment": one.moment,
        "flops": one.flops,
        "model_flops": one.model_flops,
        "compute_seconds": one.compute_seconds,
        "crossings": [dataclasses.asdict(crossing) for crossing in one.crossings],
        "step_seconds": [one.least_seconds, one.most_seconds],
        "tokens_per_second": [one.tokens / one.least_seconds, one.tokens / one.most_seconds],
        "not_counted": list(one.unknown),
    }


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.1f} ms" if value >= 1e-3 else f"{1e6 * value:.0f} us"


def _flops(value: float) -> str:
    return f"{value / 1e12:,.1f} TFLOP" if value >= 1e11 else f"{value / 1e9:,.1f} GFLOP"


def _table(found: list[Forecast]) -> Iterator[str]:
    row = "{:<44} {:>10} {:>5} {:>16} {:>18} {:>12}"
    yield row.format("layout", "memory", "", "step, at least", "tokens/s, at most", "collectives")
    for one in found:
        fits = ("tight" if one.is_tight else "") if one.fits else "NO"
        fast, tokens = one.least_seconds, f"{one.tokens / one.least_seconds:,.0f}"
        yield row.format(shown(one.layout), byte_size(one.nbytes), fits, seconds(fast), tokens, seconds(one.crossing_seconds))
    yield ""


def _verdict(one: Forecast) -> str:
    if not one.fits:
        return f"does NOT fit: {byte_size(one.nbytes - one.pool.device.usable)} too much, most of it {_largest(one)}"
    if one.is_tight:
        return f"tight, XLA has been seen to take {MOST_OVER} times what comes beside the state; --compile tells"
    return "fits"


def _largest(one: Forecast) -> str:
    return max(one.classes, key=lambda name: one.classes[name])


def _ways_out(changes: list[Change], best: Forecast) -> Iterator[str]:
    for i, change in enumerate(changes):
        fits = "fits" if change.forecast.fits else "still does not fit"
        yield f"{'ways out' if i == 0 else '':<12} {byte_size(change.forecast.nbytes):>10}  with {_as_words(change.sets)}: {fits}"
    if changes and not any(change.forecast.fits for change in changes):
        yield f"{'':<12} more devices, a smaller batch, shorter rows; the state alone takes {byte_size(best.state_bytes)} of each"


def _as_words(sets: str) -> str:
    return " ".join(f"--set {one}" for one in sets.split())


def _changes(changes: list[Change]) -> list[dict[str, Any]]:
    return [{"set": change.sets.split(), **facts(change.forecast)} for change in changes]
