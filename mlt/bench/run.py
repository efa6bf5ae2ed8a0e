"""`mlt bench`: ops timed on the device at hand beside their floors and the peers that import."""

import difflib
from collections.abc import Callable, Sequence

from mlt.bench import clock
from mlt.errors import UserError


def bench(
    op: str | None = None, *, backends: Sequence[str] = (), suite: str | None = None, say: Callable[[str], None] = print
) -> bool:
    """Prints a table; True if every implementation that can run here is right.

    Raises:
      UserError: no such op, backend or suite; names the nearest.
    """
    core = clock.pin()
    from mlt_kernels import dispatch

    from mlt.bench.suites import SUITES, rows

    if op is not None:
        _known("op", op, dispatch.ops())
    for name in backends:
        _known("backend", name, sorted({b for o in ([op] if op else dispatch.ops()) for b in dispatch.selectable(o)}))
    if suite is not None:
        _known("suite", suite, SUITES)
    suite = suite or ("cpu" if dispatch.platform() == "cpu" else "std")
    chosen = [row for row in rows(suite) if op in (None, row.op)]
    if not chosen:
        raise UserError(f"op {op!r} has no row in suite {suite!r}; its cases.py names no case of that kind in BENCHES")
    return _print_rows(chosen, backends, core, say)


def _print_rows(chosen: Sequence, backends: Sequence[str], core: int | None, say: Callable[[str], None]) -> bool:
    import jax

    from mlt.bench import accelerator, floor, measure
    from mlt.bench.peers_cpu import cpu_peers

    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    rates = measure.cpu_rates() if on_cpu else accelerator.measured_rates()
    time_of = "processor time" + ("" if core is None else f" of core {core}") if on_cpu else "median of 20 queued calls"
    say(f"{device.device_kind or device.platform}, JAX {jax.__version__}; {time_of}; {rates.source}")
    right = True
    for row in chosen:
        costs = row.costs()
        floors = [floor.seconds(cost, rates) for cost in (costs[0], costs[0] + costs[1])]
        moved, flops = (costs[0] + costs[1]).bytes, (costs[0] + costs[1]).flops
        say(f"\n{row.name}  ({row.op}, {row.dtype.__name__}): {moved / 1e6:.1f} MB, {flops / 1e9:.2f} GFLOP forward+backward")
        say(f"  {'floor':32s} {'':8s} {_ms(floors[0][0])} {'':6s} {_ms(floors[1][0])}         ({floors[0][1]}, {floors[1][1]})")
        names = [name for name in measure.implementations(row, backends) if name in _selectable(row.op)]
        measured = measure.on_cpu(row, names, cpu_peers(row.kind)) if on_cpu else accelerator.measured(row, names)
        for found in measured:
            if found.forward is None or found.both is None:
                say(f"  {found.name:32s} no time: {found.why}")
                right = right and not found.why.startswith("wrong")
                continue
            ratios = found.forward / floors[0][0], found.both / floors[1][0]
            error = "" if found.error is None else f"{found.error:.1e}"
            say(f"  {found.name:32s} {error:8s} {_ms(found.forward)} {ratios[0]:5.1f}x {_ms(found.both)} {ratios[1]:5.1f}x")
    say("\nerror (ours against float64, a peer's against ours), forward, x its floor, forward+backward, x its floor")
    return right


def _known(what: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"there is no {what} {name!r}{hint}\npresent: {', '.join(known)}")


def _selectable(op: str) -> Sequence[str]:
    from mlt_kernels import dispatch

    return dispatch.selectable(op)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:9.3f} ms"
