"""Forecasts of `mlt plan` beside what XLA for GPUs allots and sends, without a GPU.

    pip install 'mlt[gpu]'
    python tools/plan_accuracy.py [NAME ...]

compiles the step of published sizes for eight H200s, a minute or two each, and prints for every one the bytes beside the state
and those that collectives bring to a device, and XLA's over the forecast's.
"""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

from mlt.config.load import load_config
from mlt.plan.collectives import Collective
from mlt.plan.compiled import compile_step
from mlt.plan.devices import parse_pool
from mlt.plan.forecast import forecast

CASES = {
    "transformer": ("transformer", "1b", {"fsdp": 8}, 8192),
    "transformer, context": ("transformer", "1b", {"fsdp": 4, "context": 2}, 8192),
    "transformer, tensor": ("transformer", "1b", {"fsdp": 2, "tensor": 4}, 8192),
    "transformer, all three": ("transformer", "1b", {"fsdp": 2, "tensor": 2, "context": 2}, 8192),
    "gated_deltanet": ("gated_deltanet", "1.3b", {"fsdp": 8}, 4096),
    "gated_deltanet, context": ("gated_deltanet", "1.3b", {"fsdp": 2, "context": 4}, 16384),
    "mamba2": ("mamba2", "1.3b", {"fsdp": 8}, 4096),
    "griffin": ("griffin", "2b", {"fsdp": 8}, 4096),
    "mixtral": ("mixtral", "8x7b", {"fsdp": 2, "expert": 4}, 4096),
    "pkm": ("pkm", "12-layer", {"fsdp": 8}, 4096),
}
"""Name -> family, size, mesh, tokens of a row; eight rows."""
LINE = "{:<26} {:<34} {:>9} {:>9} {:>6} {:>11} {:>9} {:>6}"


def main() -> int:
    names = sys.argv[1:] or list(CASES)
    print(LINE.format("family", "mesh", "forecast", "XLA", "ratio", "collectives", "XLA", "ratio"))
    for name in names:
        family, size, mesh, length = CASES[name]
        args = [f"size={size}", "batch_size=8", f"sequence_length={length}"]
        sets = [f"mesh.{axis}={n}" for axis, n in mesh.items()]
        config, pool = load_config(f"configs/families/{family}.py", args=args, sets=sets), parse_pool("8xH200")
        told, found = forecast(config, pool), compile_step(config, pool)
        beside = told.nbytes - told.state_bytes
        crossing, sent = sum(c.nbytes for c in told.crossings), sum(map(received, found.sent))
        shown = " ".join(f"{axis}={n}" for axis, n in mesh.items())
        gib = lambda size: f"{size / 2**30:.2f}"  # noqa: E731
        memory = (gib(beside), gib(found.temporary), f"{found.temporary / beside:.2f}")
        print(LINE.format(name, shown, *memory, gib(crossing), gib(sent), f"{sent / crossing:.2f}"), flush=True)
    return 0


def received(one: Collective) -> float:
    """Bytes that it brings to a device, from those of its result."""
    n = one.group or 8
    share = {"all-gather": (n - 1) / n, "reduce-scatter": n - 1, "all-reduce": 2 * (n - 1) / n, "all-to-all": (n - 1) / n}
    return one.bytes * share.get(one.kind, 1.0)


if __name__ == "__main__":
    sys.exit(main())
