"""Print how far every backend of every op is from float64, values and every gradient, and write it as a dated report.

    python tools/error_table.py [OP ...] [--backend NAME] [--interpret] [--out kernels/reports] [--resume]

Every op, backend and case is found by its folder (`cases.py`: `TESTS`; where there are `PUBLISHED` cases those make the table,
and `TESTS`, which are harsher, a table of their own below it). Each case runs as given and under hard conditions: ragged
lengths, decays down to -60 a step, beta 0, 1 and 2, zero and repeated keys, documents of one token, a row of nothing but
padding, published steps ten times as long; in float32 and bfloat16. A value above its limit, or that is not finite, is marked
`!` and the exit code is 1. One that exact arithmetic would miss as well, were the inputs moved by one unit in their last place,
is marked `~` and listed case by case with what that moves.
A report keeps a section an op, with its own date and command: ops that are run replace theirs, and --resume leaves out those
whose section is of today.
With --interpret, Pallas backends run in interpret mode on any machine (slow: first case of each op, as given).
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib.util
import inspect
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from error_report import AMPLIFIED, SHAKES, STRESSED, Amplified, Line, Table, report, section, sections_of
from mlt_kernels import dispatch

from mlt.bench import gate
from mlt.bench.rows import differentiable

TYPES = (jnp.float32, jnp.bfloat16)
LENGTHS = (1, 17, 100)
RETURNS = ("return_final_state", "return_lse", "return_halo")

Arrays = dict[str, Any]


@functools.cache
def function(op: str, fixed: tuple[tuple[str, Any], ...]) -> gate.Fn:
    """The op as a function of its arrays, with every other result that it can return. One object a kind of call."""
    public = getattr(importlib.import_module(f"mlt_kernels.{op}"), op)
    known = inspect.signature(public).parameters
    flags = {name: True for name in RETURNS if name in known}
    return lambda arrays, implementation: public(**arrays, **flags, **dict(fixed), implementation=implementation)


def split(arguments: Arrays) -> tuple[Arrays, tuple[tuple[str, Any], ...]]:
    """Array arguments and the rest."""

    def is_array(value: Any) -> bool:
        leaves = jax.tree.leaves(value)
        return bool(leaves) and all(hasattr(leaf, "dtype") for leaf in leaves)

    arrays = {name: value for name, value in arguments.items() if is_array(value)}
    return arrays, tuple(sorted((name, value) for name, value in arguments.items() if name not in arrays))


def conditions(module: Any, index: int, case: Any, dtype: Any) -> Iterator[tuple[str, Arrays]]:
    """(condition, arguments) of a case: as given, then the hard ones it has the arguments for."""
    fields = {field.name for field in dataclasses.fields(case)}
    given = module.arguments(case, dtype=dtype)
    yield "as given", given
    if "T" in fields:
        T = LENGTHS[index % len(LENGTHS)]
        with contextlib.suppress(ValueError):  # some cases have no shorter form
            yield f"ragged length {T}", module.arguments(dataclasses.replace(case, T=T), dtype=dtype)
    if "strongest" in fields and ("log_decay" in given or "a" in given):
        yield "decays to -60", module.arguments(dataclasses.replace(case, strongest=-60.0), dtype=dtype)
    if given.get("rule") == "delta" and "beta" in given:
        for beta in (0.0, 1.0, 2.0):
            yield f"beta {beta:.0f}", given | {"beta": jnp.full_like(given["beta"], beta)}
    if "step" in given and "memory" in given and case in getattr(module, "PUBLISHED", {}).values():
        yield "steps of ten times", given | {"step": 10 * given["step"]}
    k = given.get("k")
    if getattr(k, "ndim", 0) == 4:
        yield "zero keys", given | {"k": k.at[:, k.shape[1] // 3 :].set(0)}
        one = given | {"k": jnp.broadcast_to(k[:, :1], k.shape)}
        yield "one key", one
        if given.get("rule") == "delta" and "beta" in given:
            yield "one key, beta 2", one | {"beta": jnp.full_like(given["beta"], 2)}
    ids = given.get("segment_ids")
    if hasattr(ids, "shape"):
        B, T = ids.shape
        alone = jnp.broadcast_to(jnp.arange(1, T + 1, dtype=ids.dtype), (B, T))
        yield "documents of one token", given | {"segment_ids": alone}
        yield "a row of padding", given | {"segment_ids": ids.at[0].set(0)}
    if "labels" in given and "weights" in given:
        yield "a row of padding", given | {"weights": given["weights"].at[0].set(0)}


def shaken(arrays: Arrays, seed: int) -> Arrays:
    """Every floating input but zeros moved to the next number of its type, up or down."""
    rng = np.random.default_rng(seed)

    def move(x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        bits = np.array(x).view(f"int{8 * x.dtype.itemsize}")
        steps = rng.choice([-1, 1], bits.shape).astype(bits.dtype)
        return np.where(np.asarray(x) == 0, bits, bits + steps).view(x.dtype)

    return jax.tree.map(move, arrays)


def moved(fn: gate.Fn, wrt: tuple[str, ...], arrays: Arrays, wanted: Any, real: np.ndarray | None) -> dict[str, float]:
    """By name, how far results in float64 move when the inputs do by one unit in their last place: the most of SHAKES draws."""
    draws = [gate.errors(gate.float64(fn, wrt, shaken(arrays, seed), real), wanted, real) for seed in range(SHAKES)]
    return {name: max(draw[name] for draw in draws) for name in draws[0]}


def measure(op: str, backends: list[str], *, first_only: bool) -> list[Table]:
    """The table of an op's cases, and that of its harsher ones where it tells them apart."""
    module = importlib.import_module(f"mlt_kernels.{op}.cases")
    if not hasattr(module, "PUBLISHED"):
        return [measured("", op, module.TESTS, backends, AMPLIFIED, first_only)]
    return [
        measured("As published", op, module.PUBLISHED, backends, AMPLIFIED, first_only),
        measured("Under stress (`TESTS` of `cases.py`)", op, module.TESTS, backends, STRESSED, first_only),
    ]


def measured(title: str, op: str, cases: dict[str, Any], backends: list[str], factor: float, first_only: bool) -> Table:
    module = importlib.import_module(f"mlt_kernels.{op}.cases")
    lines: dict[tuple[str, str, str], Line] = {}
    amplified: list[Amplified] = []
    refused: dict[str, str] = {}
    for index, (name, case) in enumerate(list(cases.items())[: 1 if first_only else None]):
        for dtype in TYPES:
            for condition, arguments in conditions(module, index, case, dtype):
                if first_only and condition != "as given":
                    continue
                arrays, fixed = split(arguments)
                ids = arrays.get("segment_ids")
                real = np.asarray(ids) != 0 if hasattr(ids, "shape") else None
                wrt, fn = differentiable(arrays), function(op, fixed)
                wanted = gate.float64(fn, wrt, arrays, real)
                kind, limit = jnp.dtype(dtype).name, gate.LIMITS[jnp.dtype(dtype).name]
                by_backend: dict[str, dict[str, float]] = {}
                for backend in backends:
                    try:
                        by_backend[backend] = gate.errors(gate.outcome(fn, backend, wrt, arrays, real), wanted, real)
                    except dispatch.UnsupportedError as error:
                        refused[backend] = next(iter(error.reasons.values()))
                above = {n for errors in by_backend.values() for n, error in errors.items() if not error <= limit}
                moves = moved(fn, wrt, arrays, wanted, real) if above else {}
                for n in sorted(above):
                    of = {backend: errors[n] for backend, errors in by_backend.items()}
                    amplified.append(Amplified(kind, condition, name, n, of, moves[n]))
                for backend, errors in by_backend.items():
                    key = (backend, kind, condition.partition(" length")[0])
                    lines.setdefault(key, Line(*key, factor=factor)).add(name, errors, moves)
        jax.clear_caches()
        gate.compiled.cache_clear()
    return Table(title, sorted(lines.values(), key=lambda line: (line.backend, line.dtype != "float32")), amplified, refused)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help="these ops; all by default")
    parser.add_argument("--backend", action="append", help="this backend; may repeat")
    parser.add_argument("--interpret", action="store_true", help="run Pallas backends in interpret mode, first case of each op")
    parser.add_argument("--out", type=pathlib.Path, help="folder of the report; none is written by default")
    parser.add_argument("--resume", action="store_true", help="leave out ops whose section of the report is of today")
    words = parser.parse_args()
    mode = contextlib.nullcontext()
    if words.interpret:
        from mlt_kernels import pallas

        mode = pallas.interpret()
    device = jax.devices()[0]
    name = (device.device_kind or device.platform).lower().replace(" ", "-") + ("-interpret" if words.interpret else "")
    command = "python tools/error_table.py" + "".join(f" {word}" for word in sys.argv[1:])
    path = None if words.out is None else words.out / f"{name}.md"
    wanted = words.ops or [op for op in dispatch.ops() if importlib.util.find_spec(f"mlt_kernels.{op}.cases")]
    if words.resume and path is not None:
        today = f"\n\n{datetime.date.today().isoformat()}"
        wanted = [op for op in wanted if today not in sections_of(path).get(op, "")]
    bad = []
    with mode:
        for op in wanted:
            backends = [b for b in dispatch.selectable(op) if not words.backend or b in words.backend]
            if words.interpret:
                backends = [b for b in backends if b.startswith("pallas")]
            tables = measure(op, backends, first_only=words.interpret)
            lines = [line for table in tables for line in table.lines]
            bad += [f"{op} {line.backend} {line.dtype} {line.condition}: {found}" for line in lines for found in line.bad()]
            text = section(op, tables, command)
            print(text, flush=True)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(report(sections_of(path) | {op: text}))
    print("\n".join(f"above its limit: {line}" for line in bad) or "every value is within its limit")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
