"""Steps with an Engram table in host memory against the same table on the device, in one run.

    python tools/host_table_bench.py [--rows 262144] [--steps 20]

The model is the quickstart's first block, its table of four times `rows` rows updated by LazyAdam. Steps alternate, and their
median times, what the main thread spends on rows (to collect them, and to wait for those of the step before the last), and the
bytes that the compiled step needs are printed. On a CPU the "device" is the same memory and the same cores: nothing can overlap
there, so the difference is what the rows cost, not what is left of it beside a step on an accelerator.
"""

import argparse
import time

import jax
import numpy as np

from mlt.config.load import load_config
from mlt.config.run import RunConfig
from mlt.data.loader import load_corpus, open_loader
from mlt.optim.lazy_adam import LazyAdam
from mlt.parallel.mesh import Layout
from mlt.train.feed import Feed
from mlt.train.hashing import HostHashes
from mlt.train.host_tables import HostTables
from mlt.train.residents import on_devices, residents
from mlt.train.setup import build_optimizer, describe_model, step_options
from mlt.train.state import abstract_batch, abstract_state, create_state
from mlt.train.step import jit_train_step


def config_of(where: str, rows: int) -> RunConfig:
    config = load_config("configs/quickstart.py")
    stack = config.model.stack
    engram, *others = stack.head[0].mixers
    engram = engram.replace(rows_per_head=rows, hash_on=where, table_on=where)
    stack = stack.replace(head=(stack.head[0].replace(mixers=(engram, *others)),), period=())
    optimizer = config.optimizer.replace(tables=LazyAdam(names="*.table"))
    return config.replace(model=config.model.replace(stack=stack), optimizer=optimizer)


class Run:
    """One of the two, step by step."""

    def __init__(self, where: str, rows: int):
        config, self.rules = config_of(where, rows), Layout().rules(jax.devices()[:1])
        data, whole = config.data, describe_model(config)
        specs, hashes = on_devices(config, whole), HostHashes(config)
        optimizer = build_optimizer(config, specs)
        abstract = abstract_state(specs, optimizer, self.rules)
        step = jit_train_step(abstract, optimizer, step_options(config, self.rules, specs))
        shapes = abstract_batch(self.rules, data.batch_size, data.sequence_length, hashes.fields())
        self.step = step.lower(abstract, shapes).compile()
        self.feed = Feed(self.rules, data.batch_size, data.sequence_length)
        self.tables = HostTables(residents(config, whole), self.rules, seed=0)
        self.state = self.tables.begin(create_state(specs, optimizer, self.rules, seed=0))
        self.loader = open_loader(data, load_corpus(data), extend=hashes)
        self.seconds: list[float] = []
        self.on_rows: list[float] = []

    def bytes(self) -> int:
        memory = self.step.memory_analysis()
        sizes = (memory.argument_size_in_bytes, memory.temp_size_in_bytes, memory.output_size_in_bytes)
        return sum(sizes) - memory.alias_size_in_bytes

    def advance(self) -> None:
        batch = next(self.loader)
        started = time.perf_counter()
        state, fed = self.tables.enter(self.state, batch)
        self.on_rows.append(time.perf_counter() - started)
        self.state, metrics = self.step(state, self.feed(fed))
        self.tables.leave(self.state)
        jax.block_until_ready(metrics)
        self.seconds.append(time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=262_144)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    runs = {where: Run(where, args.rows) for where in ("device", "host")}
    for _ in range(args.steps + 2):
        for run in runs.values():
            run.advance()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}; table of about {4 * args.rows:,} rows of 16")
    print(f"{'table on':>9} {'step ms':>9} {'on rows ms':>11} {'program MiB':>12}")
    for where, run in runs.items():
        step, rows = (1e3 * float(np.median(times[2:])) for times in (run.seconds, run.on_rows))
        print(f"{where:>9} {step:9.1f} {rows:11.2f} {run.bytes() / 2**20:12.1f}")
        run.loader.close()
    one, two = (run.tables.whole(run.state) for run in runs.values())
    same = all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True))
    print(f"states after {args.steps + 2} steps: {'equal bit for bit' if same else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
