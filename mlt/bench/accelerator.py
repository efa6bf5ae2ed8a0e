"""Rows measured on an accelerator, ours and the peers' in one process; and the same rows lowered where there is none."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from mlt_kernels import dispatch

from mlt.bench import clock, floor, gate, measure, peers
from mlt.bench.measure import Measured
from mlt.bench.rows import Row

ROTATED_BYTES = 4e8
"""Inputs that take turns hold at least this much together: several times the cache of any card."""
MOST_SETS = 6


def measured_rates() -> floor.Rates:
    """Matrix rate in bfloat16 and copy rate measured now; the exponential rate from the table, none measured."""
    known = floor.rates_of(jax.devices()[0].device_kind) or floor.KNOWN["H100"]
    key = jax.random.key(0)
    a = jax.random.normal(key, (8192, 8192), jnp.bfloat16)
    x = jax.random.normal(key, (2**29,), jnp.float32)
    product, copy = jax.jit(lambda a: a @ a), jax.jit(lambda x: -x)
    for call in (lambda: product(a), lambda: copy(x)):
        jax.block_until_ready(call())
    flops = 2 * 8192**3 / clock.queued_seconds([lambda: product(a)], jax.block_until_ready)
    moved = 2 * x.nbytes / clock.queued_seconds([lambda: copy(x)], jax.block_until_ready)
    words = f"ceilings measured now: {flops / 1e12:.0f} TFLOP/s bf16, {moved / 1e12:.2f} TB/s copy; exponentials: {known.source}"
    return floor.Rates(flops, moved, known.exps, words)


def measured(row: Row, names: Sequence[str], found_peers: Sequence[peers.Peer] = ()) -> list[Measured]:
    """Gate, then the median of 20 of queued calls over rotated inputs. Nothing raises: a failing row says why."""
    results = measure.gated(row, names)
    wanted: list[Any] = []

    def first() -> None:
        """What the others must agree with at full size: the portable backend, or the first that passed its gate."""
        arrays, cotangent = measure.inputs(row, 0)
        passed = [found.name.removeprefix("mlt ") for found in results if not found.why]
        name = "chunked" if "chunked" in passed else passed[0]
        wanted.append(peers.to_numpy(measure.ours(row, name, arrays, cotangent).both()))

    if any(not found.why for found in results):
        measure.attempt(Measured(row, "agreement"), first)
    for found in results:
        if not found.why:
            ours = functools.partial(measure.ours, row, found.name.removeprefix("mlt "))
            measure.attempt(found, functools.partial(_time, found, ours, wanted, keep=found.error))
    for peer in found_peers:
        found = Measured(row, peer.name)
        results.append(found)
        bind = functools.partial(peers.ready, peer, row, device="cuda")
        measure.attempt(found, functools.partial(_time, found, bind, wanted))
    return results


def portable(row: Row) -> Any:
    """Result and gradients of the portable backend at full size, on the inputs that `tried` compares with."""
    return peers.to_numpy(measure.ours(row, "chunked", *measure.inputs(row, 0)).both())


def tried(row: Row, name: str, wanted: Any) -> Measured:
    """One backend with the block sizes that hold now: the gate, agreement with `wanted`, then its times. Nothing raises.

    Programs compiled before are dropped: they have the sizes that held then.
    """
    gate.compiled.cache_clear()
    jax.clear_caches()
    (found,) = measure.gated(row, [name])
    if not found.why:
        bind = functools.partial(measure.ours, row, name)
        measure.attempt(found, functools.partial(_time, found, bind, [wanted], keep=found.error))
    return found


def _time(found: Measured, bind: Any, wanted: list[Any], *, keep: float | None = None) -> None:
    """Fills in the times of one implementation. `keep` is an error against float64 already known."""
    row = found.row
    sets = int(min(MOST_SETS, max(2, ROTATED_BYTES // max(1.0, floor.nbytes(row.described())))))
    bound = [bind(*measure.inputs(row, seed)) for seed in range(sets)]
    if wanted and not measure.agrees(found, bound[0], wanted[0]):
        return
    found.error = found.error if keep is None else keep
    for ready in bound:
        ready.wait(ready.forward())
        ready.wait(ready.both())
    found.forward = clock.queued_seconds([ready.forward for ready in bound], bound[0].wait)
    found.both = clock.queued_seconds([ready.both for ready in bound], bound[0].wait)


def lowered(row: Row, name: str) -> str:
    """Traces and lowers forward and gradients of one backend for CUDA, on any machine: `lowers`, or why it does not."""
    from mlt_kernels import pallas

    arrays, wrt = row.described(), row.wrt()

    def both(diff: dict[str, Any], fixed: dict[str, Any]) -> Any:
        out, pull = jax.vjp(lambda diff: row.call(fixed | diff, implementation=name), diff)
        return out, pull(jnp.ones_like(out))

    diff = {key: arrays[key] for key in wrt}
    fixed = {key: value for key, value in arrays.items() if key not in wrt}
    try:
        with dispatch.target_platform("gpu"), pallas.target_device():
            jax.jit(both).trace(diff, fixed).lower(lowering_platforms=("cuda",))
    except dispatch.UnsupportedError as error:
        return "refuses: " + next(iter(error.reasons.values()))
    except Exception as error:  # the list goes on to the next row
        return f"fails: {type(error).__name__}: {measure._line(error)}"
    return "lowers"
