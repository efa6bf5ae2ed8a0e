"""Compiles the TPU kernels for TPUs that are not here.

    pip install libtpu
    python tools/compile_tpu.py [--op linear_recurrence] [--device v5e v6e] [--dtype bfloat16]

Every op with a `pallas_tpu` backend, forward and backward, in the sizes of its bench cases and of `MORE` that the backend takes.
libtpu compiles the whole program as on a TPU host: what Mosaic cannot lay out and what does not fit the fast memory fails here.
It runs nothing: numbers are proved in interpret mode by tests/ops.

Exit code 1 if a program does not compile.
"""

import argparse
import dataclasses
import importlib.metadata
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
DEVICES = {
    "v4": ("v4:2x2x1", "TPU v4"),
    "v5e": ("v5e:2x2", "TPU v5e"),
    "v5p": ("v5p:2x2x1", "TPU v5p"),
    "v6e": ("v6e:2x2", "TPU v6e"),
}
"""Topology and kind of device by name."""
MORE: dict[str, dict[str, dict[str, Any]]] = {
    "linear_recurrence": {
        f"{rule}_{decay}_{K}x{V}": {"Hk": 1, "H": 2, "K": K, "V": V, "decay": decay, "documents": 64.0, "options": options}
        for rule in ("add", "delta")
        for decay in ("none", "scalar", "vector")
        for K, V in ((24, 40), (64, 128), (256, 512), (512, 256))
        for options in ({"rule": rule, "return_final_state": True, "return_chunk_states": True, "chunk_size": 256},)
    },
    "causal_conv": {
        "over_the_ends": {
            "B": 2,
            "T": 1100,
            "D": 600,
            "W": 4,
            "bias": True,
            "activation": "silu",
            "segments": True,
            "halo": True,
        },
        "farthest": {"B": 1, "T": 700, "D": 640, "W": 5, "dilation": 32, "segments": True, "halo": True},
        "most_taps": {"B": 1, "T": 512, "D": 512, "W": 16, "bias": True},
        "two_tokens": {"B": 1, "T": 2, "D": 8, "W": 3, "dilation": 2, "activation": "silu", "segments": True, "halo": True},
        "one_tap": {"B": 1, "T": 130, "D": 130, "W": 1, "segments": True},
    },
}
"""Sizes beside each op's bench cases, as fields of its `Case`."""
LINE = "{:<44} {:<9} {:<5} {:<7} {:>8} {:>8}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--op", help="this op alone")
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name contains one of these")
    parser.add_argument("--dtype", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    parser.add_argument("--device", nargs="+", choices=DEVICES, default=["v5e"])
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Else libtpu asks a cloud's metadata server which TPU this host has, and takes a lock on it.
    os.environ |= {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_ID": "0",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    sys.path.insert(0, str(ROOT / "kernels"))
    import jax
    from mlt_kernels import dispatch

    print(LINE.format("case", "dtype", "TPU", "", "kernels", "seconds"))
    failed = 0
    for name, fn, arguments in cases(options):
        for dtype in options.dtype:
            arrays = arguments(dtype)
            for device in options.device:
                start = time.perf_counter()
                try:
                    text = compile_for(*DEVICES[device], fn, arrays).as_text()
                    outcome, kernels = "ok", text.count('custom_call_target="tpu_custom_call"')
                except dispatch.UnsupportedError:
                    outcome, kernels = "refused", 0
                except Exception:  # the compiler's errors have many types; all are printed whole
                    traceback.print_exc()
                    outcome, kernels = "FAILED", 0
                if outcome == "ok" and not kernels:
                    outcome = "FAILED"
                failed += outcome == "FAILED"
                print(LINE.format(name, dtype, device, outcome, kernels, f"{time.perf_counter() - start:.1f}"), flush=True)
    print(f"\n{failed} programs do not compile; jax {jax.__version__}, libtpu {importlib.metadata.version('libtpu')}")
    return 1 if failed else 0


def cases(options: argparse.Namespace) -> Iterator[tuple[str, Any, Any]]:
    """(name, function of its arrays that gives results and gradients, dtype -> arrays)."""
    import jax
    import jax.numpy as jnp
    import mlt_kernels
    from mlt_kernels import dispatch
    from mlt_kernels.testing import value_and_grads

    for op in (options.op,) if options.op else dispatch.ops():
        if "pallas_tpu" not in dispatch.backends(op):
            continue
        module = importlib.import_module(f"mlt_kernels.{op}.cases")
        more = {name: module.Case(**fields) for name, fields in MORE.get(op, {}).items()}
        for name, case in (module.BENCHES | more).items():
            if name.startswith("cpu_") or not any(part in name for part in options.only):
                continue
            fields = {field.name for field in dataclasses.fields(case)}
            # Rows and tokens change no kernel where `MORE` does not say so, but arguments() makes them all.
            few = {x: n for x, n in {"B": 1, "T": 500}.items() if x in fields and x not in MORE.get(op, {}).get(name, {})}
            case = dataclasses.replace(case, **few)
            example = module.arguments(case)
            static = {x: value for x, value in example.items() if not all(map(is_array, jax.tree.leaves(value)))}

            def fn(arrays: dict[str, Any], static: dict[str, Any] = static, op: str = op) -> Any:
                def run(**given: Any) -> Any:
                    return getattr(mlt_kernels, op)(**given, **static, implementation="pallas_tpu")

                return value_and_grads(run, arrays)

            def arguments(dtype: str, static: Any = static, case: Any = case, module: Any = module) -> dict[str, Any]:
                made = module.arguments(case, dtype=jnp.dtype(dtype))
                return {x: value for x, value in made.items() if x not in static}

            yield f"{op} {name}", fn, arguments


def is_array(x: Any) -> bool:
    return hasattr(x, "dtype") and hasattr(x, "shape")


def compile_for(topology: str, kind: str, fn: Any, arrays: dict[str, Any]) -> Any:
    """The program compiled for one TPU."""
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding
    from mlt_kernels import pallas

    placed = SingleDeviceSharding(topologies.get_topology_desc(topology, platform="tpu").devices[0])
    specs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), arrays)
    with pallas.target_device(kind, platform="tpu", cores=1):
        return jax.jit(fn).trace(specs).lower(lowering_platforms=("tpu",)).compile()


if __name__ == "__main__":
    sys.exit(main())
