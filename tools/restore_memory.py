"""The host memory that a restore needs: a state of about 1 GB is saved, and restored in a fresh process.

    python tools/restore_memory.py [--megabytes 1000] [--largest 250] [--limit 1.5]

The state is one array of LARGEST megabytes and many of 50, as a model with one big table. Prints the process's resident
memory before the restore (Python, JAX, Orbax and TensorStore loaded) and its peak (VmHWM of /proc/self/status; Linux), and
exits with 1 where the peak, all included, is LIMIT times the state or more.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

MB = 10**6
PIECE = 50


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1000, help="of the whole state")
    parser.add_argument("--largest", type=int, default=250, help="megabytes of its largest array")
    parser.add_argument("--limit", type=float, default=1.5, help="peak over the size of the state")
    parser.add_argument("--part", choices=["save", "restore"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.part is not None:
        part = {"save": save, "restore": restore_it}[words.part]
        print(json.dumps(part(pathlib.Path(words.folder), shapes(words.megabytes, words.largest))))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        saved, found = (_fresh(part, folder, words) for part in ("save", "restore"))
    ratio = found["peak"] / saved["bytes"]
    print(f"state {saved['bytes'] / MB:,.0f} MB in {saved['arrays']} arrays, the largest of {words.largest} MB")
    print(f"restored and verified in {found['seconds']:.1f} s")
    print(f"resident before {found['before'] / MB:,.0f} MB, peak {found['peak'] / MB:,.0f} MB, ", end="")
    print(f"over the state and what was there before: {(found['peak'] - found['before'] - saved['bytes']) / MB:,.0f} MB")
    print(f"peak over the size of the state: {ratio:.2f}; must be below {words.limit}")
    return int(ratio >= words.limit)


def shapes(megabytes: int, largest: int) -> dict[str, tuple[int, int]]:
    """path -> shape of a float32 array."""
    sizes = [largest, *[PIECE] * ((megabytes - largest) // PIECE)]
    return {f"model/layer_{index}/kernel": (size * MB // 4000, 1000) for index, size in enumerate(sizes)}


def save(folder: pathlib.Path, sizes: dict[str, tuple[int, int]]) -> dict[str, float]:
    """Save random arrays."""
    import jax.numpy as jnp
    import numpy as np

    from mlt.checkpoint.save import Checkpointer

    rng = np.random.default_rng(0)
    state = {path: jnp.asarray(rng.random(shape, np.float32)) for path, shape in sizes.items()}
    with Checkpointer(folder / "checkpoints") as checkpointer:
        checkpointer.save(1, state, data={}, meta={})
    return {"bytes": sum(array.nbytes for array in state.values()), "arrays": len(state)}


def restore_it(folder: pathlib.Path, sizes: dict[str, tuple[int, int]]) -> dict[str, float]:
    """Restore them, and read the peak from the kernel."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from mlt.checkpoint.restore import restore

    where = SingleDeviceSharding(jax.devices()[0])
    target = {path: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where) for path, shape in sizes.items()}
    before, started = _status("VmRSS"), time.perf_counter()
    restored = restore(folder / "checkpoints", target)
    jax.block_until_ready(restored.state)
    return {"before": before, "peak": _status("VmHWM"), "seconds": time.perf_counter() - started}


def _status(field: str) -> int:
    """A field of this process's memory, in bytes."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _fresh(part: str, folder: str, words: argparse.Namespace) -> dict[str, float]:
    line = [sys.executable, __file__, "--part", part, "--folder", folder]
    line += ["--megabytes", str(words.megabytes), "--largest", str(words.largest)]
    done = subprocess.run(line, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
