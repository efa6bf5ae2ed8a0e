"""The report's table of hash collisions, from what a run wrote at its start."""

import contextlib
import json
from pathlib import Path
from typing import Any

HEADS = ("", "distinct n-grams", "row shared", "by chance", "lost in all heads", "by chance", "rows touched")


def collision_table(path: Path) -> tuple[list[tuple[str, ...]], str] | None:
    """(rows under HEADS, what they are of) for every order of every Engram layer; None where the run has no such file."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        told = json.loads(path.read_text())
        rows = [_row(order) for order in told["orders"]]
        note = (
            f"In the first {told['tokens']:,} tokens of the training data. Row shared: n-grams whose row another n-gram of the "
            "sample has too, averaged over the heads. By chance: what uniform hashing would give. Lost: n-grams that share "
            "their row with the same other one in every head."
        )
        return rows, note
    return None


def _row(order: dict[str, Any]) -> tuple[str, ...]:
    touched = f"{order['touched']:,} of {order['rows']:,} ({_percent(order['touched'] / order['rows'])})"
    shares = (_percent(order[name]) for name in ("shared", "shared_by_chance", "lost", "lost_by_chance"))
    return (f"{order['layer']}, {order['order']}-grams, {order['heads']} heads", f"{order['ngrams']:,}", *shares, touched)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %" if share >= 1e-4 or share == 0 else f"{100 * share:.1e} %"
