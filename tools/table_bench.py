"""Lookup and update of a sparse table: by rows against the dense gradient, in one run.

    python tools/table_bench.py [--rows 1048576,16777216] [--width 16] [--tokens 4096] [--slots 16] [--repeat 5]
    python tools/table_bench.py --balance

Both programs read `slots` rows a token (ids follow Zipf's law), take the gradient of a loss of what they read, and make one
Adam update: `dense` as AdamW does on the whole table, `lazy` with LazyAdam on the rows that are read. Peak bytes are those of
the compiled program: arguments and temporaries, outputs that are no arguments included.

`--balance` prints how much more the fullest owner is asked for than an even share of the distinct rows, for rows that are
owned in runs, as here, and dealt out one by one.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mlt.optim.lazy_adam import LazyAdam
from mlt.parallel import ops
from mlt.parallel.rows import merge
from mlt.parallel.rules import Rules
from mlt.parallel.taps import Anchor, TapedTable

ONE = Rules(None)
ADAM = LazyAdam()
RATE = 1e-3


def loss(values, ids):
    return jnp.sum(jnp.sin(ops.row_lookup(ONE, values, ids)))


def dense(state, ids):
    """(table, moments, step) after Adam on every row."""
    values, moments = state
    updates, moments = optax.adam(RATE, ADAM.beta1, ADAM.beta2, ADAM.eps).update(jax.grad(loss)(values, ids), moments)
    return values + updates, moments


def lazy(state, ids):
    """The same on the rows that are read."""
    values, slots, count = state
    found = Anchor(values)
    jax.eval_shape(lambda: loss(TapedTable(found, jnp.int32(0), None), ids))
    taps = found.taps()
    records = jax.grad(lambda taps: loss(TapedTable(Anchor(values), jnp.int32(0), taps), ids))(taps)
    grad = merge(records, values.shape, ONE)
    axes = (("memory", None), dict.fromkeys(slots, ("memory", None)))
    update = lambda old, grad_RV, count: ADAM.update(*old, grad_RV, jnp.float32(RATE), count)  # noqa: E731
    values, slots = grad.apply((values, slots), axes, update, count + 1)
    return values, slots, count + 1


def start(name: str, shape: tuple[int, int]):
    values = jnp.zeros(shape) + 0.5
    if name == "dense":
        return values, optax.adam(RATE).init(values)
    return values, {slot: jnp.zeros(shape) for slot in ADAM.slots()}, jnp.int32(0)


def measure(name: str, rows: int, width: int, ids: np.ndarray, repeat: int) -> tuple[float, int]:
    """(median seconds, peak bytes) of one step."""
    state, ids = start(name, (rows, width)), jnp.asarray(ids)
    step = {"dense": dense, "lazy": lazy}[name]
    compiled = jax.jit(functools.partial(step), donate_argnums=0).lower(state, ids).compile()
    memory = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    seconds = []
    for _ in range(repeat + 1):
        started = time.perf_counter()
        state = jax.block_until_ready(compiled(state, ids))
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds[1:])), peak


def balance(tokens: int = 65536, vocabulary: int = 129280) -> None:
    """Fullest owner over the mean, of one device's distinct rows."""
    rng = np.random.default_rng(0)
    token_ids = rng.zipf(1.1, 4 * tokens)
    token_ids = token_ids[token_ids < vocabulary][:tokens]
    pairs = token_ids[1:] * 7593627661414631 ^ token_ids[:-1] * 479593001838623
    hashed = np.concatenate([pairs % prime + first for prime, first in ((500009, 0), (500029, 500009))])
    cases = {"hashed bigrams": (hashed, 1000038), "token ids": (token_ids, vocabulary)}
    print(f"{'':>16} {'owners':>7} {'runs':>7} {'runs, equal ids sent':>21} {'dealt out':>10}")
    for name, (ids, rows) in cases.items():
        for owners in (8, 64, 256):
            own = -(-rows // owners)
            fullest = lambda owner, owners=owners: np.bincount(owner, minlength=owners).max() * owners / owner.size  # noqa: E731
            once = np.unique(ids)
            print(
                f"{name:>16} {owners:7d} {fullest(once // own):7.2f} {fullest(ids // own):21.2f} {fullest(once % owners):10.2f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="1048576,16777216")
    for name, default in (("width", 16), ("tokens", 4096), ("slots", 16), ("repeat", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--balance", action="store_true")
    args = parser.parse_args()
    if args.balance:
        balance()
        return
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}; {args.tokens} tokens, {args.slots} rows of {args.width} each")
    print(f"{'rows':>12} {'update':>7} {'ms':>10} {'tokens/s':>12} {'peak MiB':>10} {'over state':>11}")
    for rows in (int(n) for n in args.rows.split(",")):
        ids = (np.random.default_rng(0).zipf(1.2, (1, args.tokens, args.slots)) * 2654435761 % rows).astype(np.int32)
        found = {}
        for name in ("dense", "lazy"):
            seconds, peak = found[name] = measure(name, rows, args.width, ids, args.repeat)
            over = (peak - 12 * rows * args.width) / 2**20
            print(f"{rows:12,d} {name:>7} {1e3 * seconds:10.1f} {args.tokens / seconds:12,.0f} {peak / 2**20:10.1f} {over:11.1f}")
        times, parts = found["dense"][0] / found["lazy"][0], found["dense"][1] / found["lazy"][1]
        print(
            f"{'':>12} {np.unique(ids).size:,} rows read; lazy is {times:.1f} times as fast, dense peaks at {parts:.2f} times it"
        )


if __name__ == "__main__":
    main()
