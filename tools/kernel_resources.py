"""Registers, spills and shared memory of the GPU kernels, without a GPU.

    python tools/kernel_resources.py [--backend triton_gpu] [--op linear_recurrence] [--only scalar vector] [--markdown]

Every op with a `pallas_gpu` backend is compiled, forward and backward, for an H200 that is not there, in the sizes of
its bench cases and of `MORE`, in bfloat16 and float32, with the block sizes it ships; `ptxas -v -arch=sm_90a` then reads the
PTX that XLA made. Needs `ptxas` (CUDA 13) on the PATH and the CUDA plugin wheels of the installed JAX:

    pip install jax-cuda13-plugin==VERSION jax-cuda13-pjrt==VERSION

`--backend triton_gpu` reads the kernels that are called through jax-triton (`pip install jax-triton triton` beside the plugins)
the same way: Triton compiles each of them for compute capability 9.0.

Exit code 1 if a kernel spills.
"""

import argparse
import dataclasses
import importlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
ARCHITECTURE = "sm_90a"
BACKENDS = ("pallas_gpu", "triton_gpu")

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 151397597184 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""

MORE: dict[str, dict[str, dict[str, Any]]] = {
    "linear_recurrence": {
        f"{name}_{K}x{V}": {"Hk": 2, "H": 2, "K": K, "V": V, "state": False, "documents": 64.0} | kind
        for K, V in ((64, 64), (128, 64), (128, 128), (256, 256))
        for name, kind in {
            "scalar": {"decay": "scalar"},
            "none": {"decay": "none", "beta": False},
            "vector": {"decay": "vector"},
            "delta": {"options": {"rule": "delta"}},
        }.items()
    }
}
"""Sizes beside each op's bench cases, as fields of its `Case`."""


COLUMNS = ("case", "dtype", "kernel", "warps", "registers", "spill st/ld", "shared", "wgmma/mma/fma")


@dataclasses.dataclass(frozen=True)
class Usage:
    """What ptxas says of one kernel, in bytes but for the registers of a thread."""

    kernel: str
    warps: int
    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    products: str  # wgmma, mma.sync and FMA instructions in the PTX


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", choices=BACKENDS, default=BACKENDS[0])
    parser.add_argument("--op", help="this op alone")
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name contains one of these")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="this dtype alone")
    parser.add_argument("--markdown", action="store_true", help="a Markdown table")
    parser.add_argument("--keep", type=pathlib.Path, help="folder to keep XLA's dumps in")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        return report(options, options.keep or pathlib.Path(scratch))


def report(options: argparse.Namespace, folder: pathlib.Path) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder}"
    sys.path.insert(0, str(ROOT / "kernels"))
    import jax

    line = "|" + " {} |" * len(COLUMNS) if options.markdown else "{:<38} {:<9} {:<18} {:>5} {:>9} {:>11} {:>7} {:>16}"
    print(line.format(*COLUMNS))
    if options.markdown:
        print(line.format(*["---"] * len(COLUMNS)))
    spilling = 0
    for op, name, fn, arguments in calls(options):
        for dtype in (options.dtype,) if options.dtype else ("bfloat16", "float32"):
            try:
                if options.backend == "triton_gpu":
                    found = triton_usages(fn, arguments(dtype), folder)
                else:
                    compile_for_h200(jax.jit(fn), arguments(dtype))
                    found = usages(folder)
            except NotImplementedError as error:
                print(f"{op} {name}, {dtype}: {str(error).splitlines()[0]}", file=sys.stderr)
                continue
            for use in found:
                spilling += use.spill_stores > 0
                spills = f"{use.spill_stores}/{use.spill_loads}"
                numbers = (use.warps, use.registers, spills, use.shared, use.products)
                print(line.format(f"{op} {name}", dtype, use.kernel, *numbers), flush=True)
    print(f"\n{spilling} kernels spill; jax {jax.__version__}, {ptxas_version()}, {ARCHITECTURE}")
    return 1 if spilling else 0


def calls(options: argparse.Namespace) -> Iterator[tuple[str, str, Any, Any]]:
    """(op, case, function of its arrays that gives results and gradients, dtype -> abstract arrays)."""
    import jax
    import jax.numpy as jnp
    import mlt_kernels
    from mlt_kernels import dispatch
    from mlt_kernels.testing import value_and_grads

    for op in (options.op,) if options.op else dispatch.ops():
        if options.backend not in dispatch.backends(op):
            continue
        module = importlib.import_module(f"mlt_kernels.{op}.cases")
        more = {name: module.Case(**fields) for name, fields in MORE.get(op, {}).items()}
        for name, case in (module.BENCHES | more).items():
            if name.startswith("cpu_") or not any(part in name for part in options.only):
                continue
            fields = {field.name for field in dataclasses.fields(case)}
            # Rows and tokens change no kernel, but arguments() makes them all.
            case = dataclasses.replace(case, **{x: n for x, n in {"B": 1, "T": 256}.items() if x in fields})
            example = module.arguments(case)
            static = {x: value for x, value in example.items() if not jax.tree.all(jax.tree.map(is_array, value))}

            def fn(arrays: dict[str, Any], static: dict[str, Any] = static, op: str = op) -> Any:
                def run(**given: Any) -> Any:
                    return getattr(mlt_kernels, op)(**given, **static, implementation=options.backend)

                return value_and_grads(run, arrays)

            def arguments(dtype: str, static: Any = static, case: Any = case, module: Any = module) -> dict[str, Any]:
                made = module.arguments(case, dtype=jnp.dtype(dtype))
                return {x: value for x, value in made.items() if x not in static}

            yield op, name, fn, arguments


def is_array(x: Any) -> bool:
    return hasattr(x, "dtype") and hasattr(x, "shape")


def compile_for_h200(jitted: Any, arrays: dict[str, Any]) -> None:
    """Compiles for one H200; the caller reads what XLA dumped."""
    import jax
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec
    from mlt_kernels import pallas

    topology = topologies.get_topology_desc("h200", platform="cuda", target_config=H200, topology="1x1x1")
    placed = NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), PartitionSpec())
    specs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), arrays)
    with pallas.target_device("NVIDIA H200"):
        jitted.lower(specs).compile()


def usages(folder: pathlib.Path) -> list[Usage]:
    """Reads and removes XLA's dump: the kernels of its programs that XLA did not write itself."""
    pattern = r"kCustomKernel .*?\] (\S+) grid: .*? threads: \[(\d+), .*? shared_memory: (\d+) bytes"
    launched: dict[str, tuple[str, str]] = {}
    for path in folder.glob("*.thunk_sequence.txt"):
        launched |= {name: (threads, shared) for name, threads, shared in re.findall(pattern, path.read_text())}
    found: list[Usage] = []
    for path in folder.glob("*.ptx"):
        text = path.read_text()
        names = {x for x in re.findall(r"\.entry (\w+)", text) if x in launched and not re.search("fusion|^wrapped_", x)}
        if ".version" in text and names:
            found += [read_ptxas(path, name, *launched[name]) for name in names]
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return sorted(found, key=lambda use: use.kernel)


TRITON_TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int32": "i32"}


def triton_usages(fn: Any, arrays: dict[str, Any], folder: pathlib.Path) -> list[Usage]:
    """Finds the kernels that `fn` calls through jax-triton and compiles each of them with Triton alone."""
    import jax
    from mlt_kernels import dispatch

    with dispatch.target_platform("gpu"):
        jaxpr = jax.make_jaxpr(fn)(arrays).jaxpr
    os.environ["TRITON_CACHE_DIR"] = str(folder)  # jax-triton empties it, and Triton cannot do without
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    found: dict[str, Usage] = {}
    seen: list[tuple[Any, Any]] = []
    for call in triton_calls(jaxpr):
        kernel, warps = call.params["fn"], call.params["num_warps"]
        types = ["*" + TRITON_TYPES[x.aval.dtype.name] for x in call.invars]
        for place, kind, _ in call.params["scalar_args"]:
            types.insert(place, kind)
        types += ["*" + TRITON_TYPES[x.aval.dtype.name] for x in call.outvars]
        options = {name: value for name, value in call.params.items() if name in kernel.arg_names}
        if (kernel, options) in seen:
            continue
        seen.append((kernel, options))
        same = sum(other is kernel for other, _ in seen)
        label = kernel.__name__ if same == 1 else f"{kernel.__name__} {same}"  # the same kernel with other options
        signature = dict(zip(kernel.arg_names, types, strict=False)) | dict.fromkeys(options, "constexpr")
        aligned = {(n,): [["tt.divisibility", 16]] for n, kind in enumerate(types) if kind[0] == "*"}
        source = ASTSource(kernel, signature=signature, constexprs=options, attrs=aligned)
        sizes = {"num_warps": warps, "num_stages": call.params["num_stages"]}
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=sizes)
        path = folder / f"{kernel.__name__}.ptx"
        path.write_text(compiled.asm["ptx"])
        usage = read_ptxas(path, kernel.__name__, str(32 * warps), str(compiled.metadata.shared))
        found[label] = dataclasses.replace(usage, kernel=label)
    return [found[name] for name in sorted(found)]


def triton_calls(jaxpr: Any) -> Iterator[Any]:
    """The equations of a jaxpr, inner ones included, that call jax-triton."""
    import jax

    def is_jaxpr(x: Any) -> bool:
        return hasattr(getattr(x, "jaxpr", x), "eqns")

    for equation in jaxpr.eqns:
        if equation.primitive.name == "triton_kernel_call":
            yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(inner):
                yield from triton_calls(getattr(inner, "jaxpr", inner))


def read_ptxas(path: pathlib.Path, name: str, threads: str, shared: str) -> Usage:
    """What ptxas says of one kernel of a PTX file; a block's threads and shared bytes are not in it."""
    command = ["ptxas", "-v", f"-arch={ARCHITECTURE}", str(path), "-o", os.devnull]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    text = text.split(f"Compiling entry function '{name}'")[1]
    products = re.findall(r"wgmma\.mma_async|mma\.sync|fma\.rn\.f32", path.read_text())
    return Usage(
        kernel=name,
        warps=int(threads) // 32,
        registers=int(number(r"Used (\d+) registers", text)),
        spill_stores=int(number(r"(\d+) bytes spill stores", text)),
        spill_loads=int(number(r"(\d+) bytes spill loads", text)),
        shared=int(shared),
        products="/".join(str(products.count(x)) for x in ("wgmma.mma_async", "mma.sync", "fma.rn.f32")),
    )


def number(pattern: str, text: str, default: str = "0") -> str:
    match = re.search(pattern, text)
    return match.group(1) if match else default


def ptxas_version() -> str:
    text = subprocess.run(["ptxas", "--version"], check=True, capture_output=True, text=True).stdout
    return f"ptxas {number(r'release ([0-9.]+)', text)}"


if __name__ == "__main__":
    sys.exit(main())
