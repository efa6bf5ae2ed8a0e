"""Searches the block sizes of the GPU kernels on one GPU and writes them as the table of that card.

    python tools/tune_gpu.py [OP ...] --out FILE [--backend NAME] [--suite small std long]
    python tools/tune_gpu.py [OP ...] --dry-run      on any machine: the kernels, their candidates, and each of these lowered

For every row of `mlt bench` and every backend whose kernels have tables (`mlt_kernels.tuned.KERNELS`): the rule's sizes first,
then one size of one kernel after another (`mlt/bench/tuning.py`). A candidate that does not compile, that does not fit, that is
not within its limit of float64 on fresh inputs, or that differs from the portable backend at full size, is refused; one that
spills loses by its time. Runs unattended: a row that fails says why and the next goes on. FILE is written anew after every row;
a second start with the same FILE, card and versions leaves out the rows it holds. A kernel that two rows launch at one shape is
searched in the first.

A finished FILE becomes the card's table as kernels/mlt_kernels/tuned_tables/NAME.json, NAME as this prints it.
"""

import argparse
import datetime
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
from bench_gpu import card, versions
from mlt_kernels import dispatch, tuned

from mlt.bench import tuning
from mlt.bench.rows import Row
from mlt.bench.suites import rows

Search = Callable[[Row, str, tuning.Kernels, tuning.Kernels], tuning.Found]


def chosen(words: argparse.Namespace) -> Iterator[tuple[Row, str]]:
    """(row, backend) of everything to search, in order."""
    for suite in words.suite:
        for row in rows(suite):
            if words.ops and row.op not in words.ops:
                continue
            for backend in dispatch.backends(row.op):
                if (row.op, backend) in tuned.KERNELS and (not words.backend or backend in words.backend):
                    yield row, backend


def shown(sizes: tuned.Sizes) -> str:
    return " ".join(f"{name}={size}" for name, size in sizes.items())


def dry_run(words: argparse.Namespace, say: Callable[[str], Any] = print) -> bool:
    """Prints every kernel with its candidates and lowers them for CUDA, the n-th of each kernel of a call in one program.

    True if every row's own sizes lower, or are refused with a reason.
    """
    seen: set[tuned.Key] = set()
    good = True
    for row, backend in chosen(words):
        rules, answer = tuning.asked(row, backend)
        say(f"{row.name}  {backend}: {answer}")
        good = good and not answer.startswith("fails")
        mine = {key: [*tuning.candidates(key, sizes)] for key, sizes in rules.items() if key not in seen}
        seen |= rules.keys()
        for key, others in mine.items():
            say(f"    {key.kernel} {dict(key.shape)}: {shown(rules[key])}; {len(others)} candidates")
        if not answer.startswith("lowers"):
            continue
        for n in range(max(map(len, mine.values()), default=0)):
            trial = {key: others[n] for key, others in mine.items() if n < len(others)}
            with tuned.trying(trial):
                answer = tuning.accelerator.lowered(row, backend)
            say(f"        {'; '.join(f'{key.kernel} {shown(sizes)}' for key, sizes in trial.items())}: {answer}")
    return good


def begun(path: pathlib.Path, head: dict[str, Any]) -> dict[str, Any]:
    """The table to go on with: what the file holds, if it is of this card and these versions, else an empty one.

    Raises:
      ValueError: the file is of another card or other versions, or is no table.
    """
    if not path.exists():
        return head | {"rows": [], "kernels": []}
    tuned.load(path)
    found = json.loads(path.read_text())
    for name in ("device", "card", "versions"):
        if found.get(name) != head[name]:
            raise ValueError(f"{path}: its {name} is {found.get(name)!r}, here it is {head[name]!r}: begin another file")
    return found


def write(path: pathlib.Path, table: dict[str, Any]) -> None:
    """Whole or not at all: a run may be killed at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(table, indent=1) + "\n")
    os.replace(partial, path)


def run(words: argparse.Namespace, search: Search = tuning.search, say: Callable[[str], Any] = print) -> None:
    head = {"device": jax.devices()[0].device_kind, "card": card(), "versions": versions()}
    table = begun(words.out, head)
    say(f"{head['card']}; {head['versions']}; this card's table is {tuned.file_of(head['device']).name}")
    done = {(line["row"], line["backend"]) for line in table["rows"]}
    for row, backend in chosen(words):
        if (row.name, backend) in done:
            continue
        known = dict(map(tuned.checked, table["kernels"]))
        record: dict[str, Any] = {"row": row.name, "backend": backend, "date": datetime.date.today().isoformat()}
        try:
            rules, why = tuning.asked(row, backend)
            fresh = {key: sizes for key, sizes in rules.items() if key not in known}
            if fresh and why == "lowers":
                found = search(row, backend, fresh, known)
                record |= {"rule_ms": ms(found.rule), "best_ms": ms(found.best), "tried": found.tried, "refused": found.refused}
                table["kernels"] += tuning.lines(found, row) if found.best is not None else []
            else:
                record["why"] = why if why != "lowers" else "all its kernels are in the table"
        except Exception as error:  # unattended: the next row goes on
            record["why"] = f"{type(error).__name__}: {error}"
        table["rows"].append(record)
        write(words.out, table)
        say(json.dumps(record))


def ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e3 * seconds, 5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help="these ops; all with tables by default")
    parser.add_argument("--out", type=pathlib.Path, help="the table; goes on with it if it is there")
    parser.add_argument("--backend", action="append", help="this backend; may repeat")
    parser.add_argument("--suite", action="append", choices=("small", "std", "long"), help="may repeat; std")
    parser.add_argument("--dry-run", action="store_true", help="kernels and candidates, each lowered for CUDA")
    words = parser.parse_args()
    words.suite = words.suite or ["std"]
    known = sorted({op for op, _ in tuned.KERNELS})
    unknown = sorted(set(words.ops) - set(known))
    if unknown:
        parser.error(f"no kernels with tables: {', '.join(unknown)}; there are {', '.join(known)}")
    if words.dry_run:
        return not dry_run(words)
    if words.out is None:
        parser.error("--out FILE is needed to run")
    if jax.default_backend() != "gpu":
        parser.error(f"JAX sees no GPU here but {jax.default_backend()}; --dry-run shows what would run")
    run(words)
    return 0


if __name__ == "__main__":
    sys.exit(main())
