"""Ratios of the portable backends to the best public forms on one CPU core, worst of several rounds.

    python tools/bench_cpu.py [WORD ...] [--rounds 3] [--checkouts DIR] [--growth] [--out FILE.md]

Both sides run in one process on one pinned core, in turns, on the same float32 inputs, behind the same correctness gate;
processor time counts. Only ratios within a round are printed: the times of a shared machine mean nothing. Peers are what
imports (PyTorch, transformers, flash-linear-attention); `--checkouts` is a folder that may hold `maxtext` and `mamba_ssm`.
WORD picks rows whose name contains it. `--growth` times 64k tokens in rows of 1k to 64k instead: equal if time is linear in T.
"""

import argparse
import datetime
import functools
import pathlib
import sys
from typing import Any

from mlt.bench import clock

CORE = clock.pin()

import jax  # noqa: E402

from mlt.bench import measure, peers, rows  # noqa: E402
from mlt.bench.peers_cpu import cpu_peers  # noqa: E402
from mlt.bench.suites import rows as suite_rows  # noqa: E402

TARGETS = {"ssd": 0.7, "gla": 0.7, "gated_delta": 1.0, "attention": 1.3, "moe": 1.1, "cross_entropy": 0.8, "pkm": 1.2}
"""Largest forward+backward time over the best public form's, by kind of row."""
OWN_TARGETS = {"rg_lru": 3.0, "mamba1": 5.0}
"""Largest forward+backward time over the own forward: the only public forms here are token loops, weak opponents."""
SLOW_PEERS = ("MaxText jax_chunk",)
"""Left out unless asked for: it solves batched triangular systems, at which XLA's CPU backend stalls."""


def measured_line(row: rows.Row, words: argparse.Namespace) -> list[str]:
    """Cells of a row, and a line for each peer that could not be had."""
    found_peers = [p for p in cpu_peers(row.kind, words.checkouts) if words.slow or p.name not in SLOW_PEERS]
    results = measure.on_cpu(row, ["chunked"], found_peers, repeats=words.repeats, rounds=words.rounds)
    ours, others = results[0], [found for found in results[1:] if found.rounds]
    notes = [f"{row.name}: {found.name}: {found.why}" for found in results if not found.rounds]
    if not ours.rounds:
        return [row.name, "", "", "", "", "failed", *notes]
    own = max(both / forward for forward, both in ours.rounds)
    cells = [row.name]
    worst = None
    for which in (0, 1):
        if not others:
            cells += ["-"] if which == 0 else ["-", "-"]
            continue
        best = [min(others, key=lambda found: found.rounds[i][which]) for i in range(words.rounds)]
        ratios = [ours.rounds[i][which] / best[i].rounds[i][which] for i in range(words.rounds)]
        cells.append(" ".join(f"{ratio:.2f}" for ratio in ratios))
        if which == 1:
            worst = max(ratios)
            cells.append(", ".join(dict.fromkeys(found.name for found in best)))
    cells.append(f"{own:.1f}")
    cells.append(verdict(row, worst, own))
    return [*cells, *notes]


def verdict(row: rows.Row, worst: float | None, own: float) -> str:
    """Whether the worst round meets the row's target."""
    if row.kind in OWN_TARGETS:
        limit = OWN_TARGETS[row.kind]
        return f"{'met' if own <= limit else 'MISSED'}: {own:.1f} of its forward, at most {limit}"
    if worst is None or row.kind not in TARGETS:
        return "no target"
    return f"{'met' if worst <= TARGETS[row.kind] else 'MISSED'}: {worst:.2f}, at most {TARGETS[row.kind]}"


def growth(words: argparse.Namespace) -> list[str]:
    """Forward+backward time of 64k tokens in rows of T over that in rows of 1k, in the same round.

    At once is a batch of 64k / T rows: the arrays have one size whatever T is, so the ratio is what a longer row costs.
    In turn is 64k / T calls of one row, whose arrays grow from what a cache holds to what it does not.
    """
    lines = ["| op | T | B at once | at once, over T 1k | calls in turn | in turn, over T 1k |", "|---|---|---|---|---|---|"]
    lengths = [1024, 4096, 16384, 65536]
    for name, kind in (("scalar decay, add", "ssd"), ("gated delta", "gated_delta")):
        if words.only and not any(word in name for word in words.only):
            continue
        calls, waits = [], []
        for T in lengths:
            for B in (lengths[-1] // T, 1):
                row = rows.recurrence(f"{kind} B{B} T{T}", kind, B=B, T=T, H=2, K=64, V=64, dtype=jax.numpy.float32)
                bound = measure.ours(row, "chunked", *measure.inputs(row, 0))
                bound.wait(bound.both())
                calls.append(functools.partial(in_turn, bound, lengths[-1] // (B * T)))
                waits.append(bound.wait)
        rounds = [clock.alternate(calls, waits, repeats=words.repeats) for _ in range(words.rounds)]
        for i, T in enumerate(lengths):
            at_once, one_by_one = (" ".join(f"{times[2 * i + j] / times[j]:.2f}" for times in rounds) for j in (0, 1))
            count = lengths[-1] // T
            lines.append(f"| {name} | {T // 1024}k | {count} | {at_once} | {count} | {one_by_one} |")
    return lines


def in_turn(bound: peers.Ready, count: int) -> Any:
    """The last of `count` forward and backward passes, each waited for."""
    for _ in range(count - 1):
        bound.wait(bound.both())
    return bound.both()


def versions() -> str:
    found = [f"JAX {jax.__version__}"]
    for name in ("torch", "transformers", "fla"):
        try:
            found.append(f"{name} {getattr(peers.module(name), '__version__', '')}".strip())
        except peers.Missing:
            continue
    return ", ".join(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("only", nargs="*", metavar="WORD", help="rows whose name contains one of these")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=4, help="turns in a round; the least time counts")
    parser.add_argument("--checkouts", type=pathlib.Path, help="folder with maxtext and mamba_ssm, if they are at hand")
    parser.add_argument("--growth", action="store_true", help="64k tokens in rows of 1k to 64k")
    parser.add_argument("--slow", action="store_true", help=f"also {', '.join(SLOW_PEERS)}")
    parser.add_argument("--out", type=pathlib.Path, help="also write the table here")
    words = parser.parse_args()
    command = "python tools/bench_cpu.py" + "".join(f" {w}" for w in sys.argv[1:])
    lines = [f"{datetime.date.today().isoformat()}, one pinned core, {versions()}", f"`{command}`", ""]
    print(*lines, sep="\n", flush=True)
    new: list[str] = []
    missed = False
    if words.growth:
        new = growth(words)
        print(*new, sep="\n")
    else:
        head = "| row | forward, ours / best | forward+backward | best public form | f+b / own forward | target |"
        new = [head, "|---|---|---|---|---|---|"]
        print(*new, sep="\n", flush=True)
        notes: list[str] = []
        for row in suite_rows("cpu"):
            if words.only and not any(word in row.name for word in words.only):
                continue
            cells = measured_line(row, words)
            new.append("| " + " | ".join(cells[:6]) + " |")
            notes += cells[6:]
            missed = missed or "MISSED" in cells[5] or "failed" in cells[5]
            print(new[-1], flush=True)
        new += ["", *dict.fromkeys(f"Not compared: {note}" for note in notes)]
        print(*dict.fromkeys(notes), sep="\n")
    if words.out is not None:
        words.out.write_text("\n".join([*lines, *new]) + "\n")
    return missed


if __name__ == "__main__":
    sys.exit(main())
