"""One row measured: correctness first, then time. A row that fails its gate has no time."""

import dataclasses
import functools
import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from mlt_kernels import dispatch
from mlt_kernels.testing import relative_error

from mlt.bench import clock, gate, peers
from mlt.bench.floor import Rates
from mlt.bench.rows import Row

AGREEMENT = 3.0
"""At full size two implementations, each within its limit of the truth, may be this many limits apart."""


FAR = 8.0
"""An implementation this many times slower than the fastest is timed once, not in every round."""


@dataclasses.dataclass
class Measured:
    """One implementation on one row. Seconds are None where it failed, `why` says how."""

    row: Row
    name: str
    error: float | None = None  # worst against float64 (ours, small shape) or against ours (a peer, full shape)
    forward: float | None = None
    both: float | None = None
    why: str = ""
    rounds: list[tuple[float, float]] = dataclasses.field(default_factory=list)  # (forward, both) of each round


def implementations(row: Row, names: Sequence[str] | None = None) -> list[str]:
    """Backends of a row's op to time: those named, else all but the oracle."""
    return list(names or dispatch.backends(row.op))


def worst_error(row: Row, name: str) -> dict[str, float]:
    """Errors against float64 on fresh inputs of the row's kind at a size that the float64 reference can hold."""
    small = row.small()
    arrays = small.draw(jax.random.key(secrets.randbelow(2**31)))
    wrt = small.wrt()
    real = np.asarray(arrays["segment_ids"]) != 0 if hasattr(arrays.get("segment_ids"), "shape") else None
    wanted = gate.float64(small.call, wrt, arrays, real)
    return gate.errors(gate.outcome(small.call, name, wrt, arrays, real), wanted, real)


def ours(row: Row, name: str, arrays: dict[str, Any], cotangent: Any) -> peers.Ready:
    """A backend of ours bound to inputs, through the same door as a peer."""
    peer = peers.Peer(f"mlt {name}", "jax", lambda row: functools.partial(row.call, implementation=name))
    return peers.ready(peer, row, arrays, cotangent)


def inputs(row: Row, seed: int) -> tuple[dict[str, Any], np.ndarray]:
    """Fresh arguments and a cotangent as NumPy arrays; 16-bit types travel as float32."""
    arrays = jax.tree.map(peers.to_numpy, row.draw(jax.random.key(seed)))
    out = jax.eval_shape(lambda a: row.call(a, implementation="reference"), row.described())
    return arrays, np.asarray(np.random.default_rng(seed).standard_normal(out.shape), np.float32)


def limit(row: Row) -> float:
    return gate.LIMITS[jnp.dtype(row.dtype).name]


def gated(row: Row, names: Iterable[str]) -> list[Measured]:
    """Each backend through the gate; what cannot run here says why."""
    results = []
    for name in names:
        found = Measured(row, f"mlt {name}")
        try:
            errors = worst_error(row, name)
            found.error = max(errors.values())
            if not found.error <= limit(row):
                bad = max(errors, key=lambda key: errors[key])
                found.why = f"wrong: {bad} is {errors[bad]:.1e} off, limit {limit(row):.0e}"
        except Exception as error:  # one row must not end an unattended run
            found.why = f"{type(error).__name__}: {_line(error)}"
        results.append(found)
    return results


def agrees(found: Measured, candidate: peers.Ready, wanted: Any) -> bool:
    """Whether a peer computes what we do, on the same inputs at full size; else `found.why` says what differs."""
    out, grads = peers.to_numpy(candidate.both())
    differences = {"out": relative_error(np.reshape(out, np.shape(wanted[0])), wanted[0])}
    for name, want in wanted[1].items():
        if grads.get(name) is not None:
            differences[f"d {name}"] = relative_error(grads[name], want)
    found.error = max(differences.values())
    if not found.error <= AGREEMENT * limit(found.row):
        bad = max(differences, key=lambda key: differences[key])
        found.why = f"differs from ours: {bad} by {differences[bad]:.1e}"
    return not found.why


def attempt(found: Measured, work: Callable[[], None]) -> None:
    """Runs `work`; an exception becomes the reason why the row has no time."""
    try:
        work()
    except Exception as error:  # as above
        found.why = found.why or f"{type(error).__name__}: {_line(error)}"


def on_cpu(
    row: Row, names: Sequence[str], found_peers: Sequence[peers.Peer] = (), *, repeats: int = 4, rounds: int = 1, seed: int = 0
) -> list[Measured]:
    """All implementations of a row in turns on this core: least processor seconds of `repeats`, in each of `rounds`."""
    results = gated(row, names)
    arrays, cotangent = inputs(row, seed)
    ready: list[tuple[Measured, peers.Ready]] = []
    wanted = None
    for found in results:
        if not found.why:
            bound = ours(row, found.name.removeprefix("mlt "), arrays, cotangent)
            ready.append((found, bound))
            wanted = wanted if wanted is not None else peers.to_numpy(bound.both())
    for peer in found_peers:
        found = Measured(row, peer.name)
        results.append(found)

        def bind(found: Measured = found, peer: peers.Peer = peer) -> None:
            bound = peers.ready(peer, row, arrays, cotangent)
            if wanted is not None and agrees(found, bound, wanted):
                ready.append((found, bound))

        attempt(found, bind)
    once = {}
    for found, bound in ready:
        bound.wait(bound.forward())
        once[found.name] = tuple(clock.processor_seconds(call, bound.wait) for call in (bound.forward, bound.both))
    least = min((both for _, both in once.values()), default=0.0)
    near = [(found, bound) for found, bound in ready if once[found.name][1] < FAR * least]
    calls = [call for _, bound in near for call in (bound.forward, bound.both)]
    waits = [bound.wait for _, bound in near for _ in range(2)]
    for _ in range(rounds):
        times = clock.alternate(calls, waits, repeats=repeats)
        for i, (found, _) in enumerate(near):
            found.rounds.append((times[2 * i], times[2 * i + 1]))
    for found, _ in ready:
        found.rounds = found.rounds or [once[found.name]] * rounds
        found.forward, found.both = (min(taken) for taken in zip(*found.rounds, strict=True))
    return results


def cpu_rates(repeats: int = 5) -> Rates:
    """Copy, matrix and exponential rates of this core in float32, measured now."""
    a = jax.random.normal(jax.random.key(0), (1536, 1536))
    exps = jax.random.normal(jax.random.key(1), (2**20,))
    product, exp = jax.jit(lambda a: a @ a), jax.jit(jnp.exp)
    # In place: fresh memory would be paged in, at several times the cost of the copy.
    negate = jax.jit(lambda x: -x, donate_argnums=0)
    held = [jnp.full((2**24,), 0.5, jnp.float32)]

    def copy() -> Any:
        held[0] = negate(held[0])
        return held[0]

    calls = [copy, lambda: product(a), lambda: exp(exps)]
    for call in calls:
        jax.block_until_ready(call())
    seconds = clock.alternate(calls, [jax.block_until_ready] * 3, repeats=repeats)
    rates = 2 * 1536**3 / seconds[1], 2 * held[0].nbytes / seconds[0], exps.size / seconds[2]
    words = f"measured now: {rates[0] / 1e9:.0f} GFLOP/s, {rates[1] / 1e9:.1f} GB/s copy, {rates[2] / 1e9:.2f} G exp/s"
    return Rates(*rates, words)


def _line(error: Exception) -> str:
    return str(error).splitlines()[0][:160] if str(error) else ""
