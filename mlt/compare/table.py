"""The table of a comparison: as text, as Markdown and as the cells of a page."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from mlt.compare.numbers import Numbers
from mlt.report.text import amount, byte_size

Cells = list[list[str]]


def _loss(value: float) -> str:
    return f"{value:.4f}"


def _amount(value: float) -> str:
    return amount(value) or "-"


COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "parameters": ("parameters", lambda value: f"{value:,.0f}"),
    "active": ("active", lambda value: f"{value:,.0f}"),
    "in_tables": ("in tables", lambda value: f"{value:,.0f}"),
    "flops_per_token": ("FLOPs/token", _amount),
    "state_bytes": ("state at 128k", byte_size),
    "tokens": ("tokens", _amount),
    "train_loss": ("train loss", _loss),
    "eval_loss": ("held-out loss", _loss),
    "bits_per_byte": ("bits/byte", _loss),
    "tokens_per_second": ("tokens/s", _amount),
    "loss_at_equal_flops": ("loss at equal FLOPs", _loss),
}
"""Value -> (heading, how it is written)."""

SPREAD = ("train_loss", "eval_loss", "bits_per_byte", "loss_at_equal_flops")
"""What a row over several seeds gives the standard deviation of."""

EXPLAINED = (
    "FLOPs/token: forward, over full rows; active: parameters that one token's forward pass touches; in tables: rows of "
    "memories and Engram. Train loss: mean of what was logged in the last tenth of the steps; tokens/s: median."
)


def cells(found: Sequence[Numbers], equal_flops: float | None) -> Cells:
    """Headings, then a row for each label; over several seeds the mean, and for losses their standard deviation."""
    rows = [["run", *(heading for heading, _ in COLUMNS.values())]]
    labels = list(dict.fromkeys(numbers.planned.label for numbers in found))
    for label in labels:
        group = [numbers.values(equal_flops) for numbers in found if numbers.planned.label == label]
        rows.append([label, *(_cell(name, [values[name] for values in group]) for name in COLUMNS)])
    return rows


def _cell(name: str, values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known or len(known) < len(values):
        return "-"
    text = COLUMNS[name][1](float(np.mean(known)))
    return f"{text} ± {np.std(known, ddof=1):.4f}" if name in SPREAD and len(known) > 1 else text


def remarks(found: Sequence[Numbers], equal_flops: float | None, different: Sequence[str], notes: Sequence[str]) -> list[str]:
    """What a reader of the table has to know."""
    lines = [EXPLAINED]
    if equal_flops and any(numbers.steps * numbers.flops_per_step > 1.01 * equal_flops for numbers in found):
        lines.append(
            f"Loss at equal FLOPs: train loss after {_amount(equal_flops)} FLOPs of training, what the cheapest run has spent. "
            "The others were then still on their way, at a higher learning rate."
        )
    for numbers in found:
        run, steps = numbers.planned, numbers.planned.config.train.steps
        if numbers.failed is not None:
            lines.append(f"{run.name} failed: {numbers.failed}")
        elif numbers.steps < steps:
            lines.append(f"{run.name} is not finished: step {numbers.steps} of {steps}")
    lines += [f"not the same: {line}" for line in different]
    return lines + [f"besides the model: {line}" for line in notes]


def as_text(rows: Cells) -> str:
    """Aligned columns, the first to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        numbers = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *numbers]))
    return "\n".join(lines)


def as_markdown(rows: Cells, lines: Sequence[str]) -> str:
    table = [rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]]
    text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table)
    return text + "\n\n" + "\n".join(f"- {line}" for line in lines) + "\n"
