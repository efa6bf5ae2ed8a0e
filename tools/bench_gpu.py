"""Every op and the peers' kernels on one GPU in one process: correctness, then time, then the ratio to the floor.

    python tools/bench_gpu.py --out DIR [--suite small std long] [WORD ...]
    python tools/bench_gpu.py --dry-run          on any machine: rows, floors, peers found, and each of our rows lowered

Runs unattended: a row that fails says why and the next one goes on. Ceilings are measured first. Times are medians of 20 of
8 queued calls over inputs that take turns and exceed the cache; forward+backward is one forward and all input gradients for
a random cotangent. Before its time a row of ours must be within its limit of float64 on fresh inputs of smaller size, and
every row within three limits of our portable backend at full size. Peers run without graph replay, so the
host's launches count below about 0.3 ms. DIR gets bench.md and bench.json, rewritten after every row.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

# Peers need memory in the same process.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
from mlt_kernels import dispatch

from mlt.bench import accelerator, floor
from mlt.bench.measure import Measured
from mlt.bench.peers_gpu import PACKAGES, gpu_peers
from mlt.bench.rows import Row
from mlt.bench.suites import rows

ROOT = pathlib.Path(__file__).parent.parent


def backends(row: Row) -> list[str]:
    """All of ours but those for TPUs, whether or not they are a default: timing them is what this is for."""
    names = [name for name in dispatch.backends(row.op) if not name.endswith("_tpu")]
    return sorted(names, key=lambda name: (name in dispatch.PORTABLE, name))


def versions() -> str:
    found = [f"Python {sys.version.split()[0]}", f"JAX {jax.__version__}"]
    for name in ("triton", "jax-triton", *PACKAGES):
        try:
            found.append(f"{name} {importlib.metadata.version(name.replace('_', '-'))}")
        except importlib.metadata.PackageNotFoundError:
            if importlib.util.find_spec(name.replace("-", "_")):
                found.append(name)
    asked = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return ", ".join([*found, f"mlt {commit or 'of unknown commit'}"])


def card() -> str:
    try:
        asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return jax.devices()[0].device_kind or jax.devices()[0].platform


def as_record(found: Measured, floors: tuple[float, float], bound: str) -> dict[str, Any]:
    """A line of the JSON."""
    return {
        "row": found.row.name,
        "op": found.row.op,
        "sizes": found.row.sizes,
        "implementation": found.name,
        "error": found.error,
        "forward_ms": None if found.forward is None else 1e3 * found.forward,
        "both_ms": None if found.both is None else 1e3 * found.both,
        "floor_forward_ms": 1e3 * floors[0],
        "floor_both_ms": 1e3 * floors[1],
        "bound": bound,
        "why": found.why,
    }


def markdown(head: list[str], records: list[dict[str, Any]]) -> str:
    lines = [*head, ""]
    lines.append("| row | implementation | error | forward ms | x floor | forward+backward ms | x floor | over best peer |")
    lines.append("|---|---|---|---|---|---|---|---|")
    for record in records:
        if record["both_ms"] is None:
            lines.append(f"| {record['row']} | {record['implementation']} | no time: {record['why']} | | | | | |")
            continue
        theirs = [r["both_ms"] for r in records if r["row"] == record["row"] and r["both_ms"] and not _is_ours(r)]
        over = f"{record['both_ms'] / min(theirs):.2f}" if theirs and _is_ours(record) else ""
        error = "" if record["error"] is None else f"{record['error']:.1e}"
        ratios = record["forward_ms"] / record["floor_forward_ms"], record["both_ms"] / record["floor_both_ms"]
        times = f"{record['forward_ms']:.3f} | {ratios[0]:.1f} | {record['both_ms']:.3f} | {ratios[1]:.1f}"
        lines.append(f"| {record['row']} | {record['implementation']} | {error} | {times} | {over} |")
    return "\n".join(lines) + "\n"


def _is_ours(record: dict[str, Any]) -> bool:
    return record["implementation"].startswith("mlt ")


def floors_of(row: Row, rates: floor.Rates) -> tuple[tuple[float, float], str]:
    """Forward and forward+backward floors, and what bounds each direction."""
    costs = row.costs()
    forward, backward = (floor.seconds(cost, rates) for cost in costs)
    return (forward[0], forward[0] + backward[0]), f"{forward[1]}/{backward[1]}"


def chosen(words: argparse.Namespace) -> list[Row]:
    found = [row for suite in words.suite for row in rows(suite)]
    return [row for row in found if not words.only or any(word in row.name for word in words.only)]


def dry_run(words: argparse.Namespace, say: Any = print) -> bool:
    """The plan of a run, without a GPU. True if every one of our rows lowers or refuses with a reason."""
    say(f"would run on a GPU; here: {versions()}")
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    say(f"peers' packages here: {', '.join(n for n in PACKAGES if n not in missing) or 'none'}; not here: {', '.join(missing)}")
    rates = floor.KNOWN["H200"]
    say(f"floors: {rates.source}\n")
    good = True
    for row in chosen(words):
        (forward, both), bound = floors_of(row, rates)
        say(f"{row.name}  {row.sizes}  floor {1e3 * forward:.3f} / {1e3 * both:.3f} ms ({bound})")
        for name in backends(row):
            started = time.perf_counter()
            answer = accelerator.lowered(row, name)
            say(f"    mlt {name}: {answer} ({time.perf_counter() - started:.1f} s)")
            good = good and not answer.startswith("fails")
        for peer in gpu_peers(row.kind):
            say(f"    peer {peer.name}")
    return good


def run(words: argparse.Namespace) -> None:
    words.out.mkdir(parents=True, exist_ok=True)
    rates = accelerator.measured_rates()
    command = "python tools/bench_gpu.py" + "".join(f" {word}" for word in sys.argv[1:])
    head = [f"# {card()}", "", f"{datetime.date.today().isoformat()}, {versions()}", "", f"{rates.source}. Command: `{command}`"]
    print(*head, sep="\n", flush=True)
    records: list[dict[str, Any]] = []
    for row in chosen(words):
        try:
            floors, bound = floors_of(row, rates)
            results = accelerator.measured(row, backends(row), gpu_peers(row.kind))
        except Exception as error:  # unattended: the next row goes on
            print(f"{row.name}: {type(error).__name__}: {error}", flush=True)
            continue
        for found in results:
            records.append(as_record(found, floors, bound))
            shown = found.why or f"{1e3 * found.forward:.3f} ms forward, {1e3 * found.both:.3f} ms both"
            print(f"{row.name}  {found.name}  {shown}", flush=True)
        (words.out / "bench.md").write_text(markdown(head, records))
        facts = {"head": head, "records": records}
        (words.out / "bench.json").write_text(json.dumps(facts, indent=1) + "\n")
        jax.clear_caches()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("only", nargs="*", metavar="WORD", help="rows whose name contains one of these")
    parser.add_argument("--out", type=pathlib.Path, help="folder of bench.md and bench.json")
    parser.add_argument("--suite", action="append", choices=("small", "std", "long"), help="may repeat; small, then std")
    parser.add_argument("--dry-run", action="store_true", help="the plan, and every row of ours lowered for CUDA")
    words = parser.parse_args()
    words.suite = words.suite or ["small", "std"]
    if words.dry_run:
        return not dry_run(words)
    if words.out is None:
        parser.error("--out DIR is needed to run")
    if jax.default_backend() != "gpu":
        parser.error(f"JAX sees no GPU here but {jax.default_backend()}; --dry-run shows what would run")
    run(words)
    return 0


if __name__ == "__main__":
    sys.exit(main())
