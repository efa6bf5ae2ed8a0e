"""Bytes per device of the compiled train step as sequence shards double.

    python tools/context_memory.py [--length 32768] [--shards 1,2,4]

compiles the quickstart's step at width 64, one row of `length` tokens, on simulated devices, runs nothing, and prints
what the compiler allots to temporary values on each device. A minute or two a row.
"""

import argparse

import jax

from mlt.config.load import load_config
from mlt.parallel.mesh import Layout
from mlt.train.setup import build_optimizer, describe_model, step_options
from mlt.train.state import abstract_batch, abstract_state
from mlt.train.step import jit_train_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--shards", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2, 4])
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", max(options.shards))
    before = None
    for shards in options.shards:
        found = temporary_bytes(options.length, shards)
        ratio = "" if before is None else f"   {before / found:.2f} times less"
        print(f"context={shards}: {found / 1e6:8.1f} MB per device{ratio}", flush=True)
        before = found


def temporary_bytes(length: int, shards: int) -> int:
    args = ["width=64", f"sequence_length={length}", "batch_size=1"]
    config = load_config("configs/quickstart.py", args=args, sets=["remat.mode=sub_layer"])
    specs = describe_model(config)
    optimizer = build_optimizer(config, specs)
    rules = Layout(context=shards, attention="zigzag").rules(jax.devices()[:shards])
    state, batch = abstract_state(specs, optimizer, rules), abstract_batch(rules, 1, length)
    compiled = jit_train_step(state, optimizer, step_options(config, rules, specs)).trace(state, batch).lower().compile()
    return compiled.memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    main()
