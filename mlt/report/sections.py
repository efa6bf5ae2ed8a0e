"""The sections of a run's report that are words and tables, each empty where the run directory has nothing for it."""

import html
from collections.abc import Iterable, Sequence
from typing import Any

from mlt.checkpoint.layout import CheckpointError, committed_steps, read_meta, step_path
from mlt.report.collisions import HEADS, collision_table
from mlt.report.goodput import CAUSES, Account
from mlt.report.history import History, read_rows
from mlt.report.text import amount, byte_size, duration, moment, printable
from mlt.run_paths import RunPaths

_START_FIELDS = ("kind", "step", "time", "steps", "first_step")
_TONES = {
    **{"step": "good", "compile": "k1", "startup": "k6", "data": "k2", "evaluation": "k4", "checkpoint": "k5", "check": "wait"},
    **{"skipped": "bad", "rolled_back": "bad", "lost": "bad"},
}
"""Cause of spent time -> its class in page.css, a colour."""


def time_spent(account: Account) -> str:
    """Where the time of all starts went, as a bar and a table."""
    spent = {cause: seconds for cause, seconds in account.seconds.items() if seconds > 0}
    if not account.total:
        return ""
    order = sorted(spent, key=lambda cause: -spent[cause])
    shares = {cause: f"{100 * spent[cause] / account.total:.1f} %" for cause in order}
    bar = "".join(
        f'<i class="{_TONES.get(cause, "wait")}" style="width:{100 * spent[cause] / account.total:.2f}%" '
        f'title="{html.escape(CAUSES.get(cause, cause))}: {shares[cause]}"></i>'
        for cause in order
    )
    rows = "".join(
        f'<tr><td><span class="key block {_TONES.get(cause, "wait")}">{html.escape(CAUSES.get(cause, cause))}</span></td>'
        f'<td class="n">{duration(spent[cause])}</td><td class="n">{shares[cause]}</td></tr>'
        for cause in order
    )
    heads = '<tr><th></th><th class="n">time</th><th class="n">share</th></tr>'
    down = f" Not counted: {duration(account.down)} between a process and the next." if account.down >= 1 else ""
    note = (
        f"Goodput {100 * account.goodput:.1f} %: time of training steps that the model keeps, over all the time of its processes."
    )
    return (
        f'<section><h2>Where the time went</h2><div class="spent">{bar}</div>'
        f'<div class="card"><table class="narrow"><thead>{heads}</thead><tbody>{rows}</tbody></table></div>'
        f'<p class="note">{note}{down}</p></section>'
    )


def samples(paths: RunPaths) -> str:
    """Texts drawn on the way, the last one open."""
    rows = [row for row in read_rows(paths.samples_path) if isinstance(row.get("text"), str)]
    if not rows:
        return ""
    last = f'<div class="card">{_sample(rows[-1])}<p class="note">after step {rows[-1]["step"]:,}</p></div>'
    earlier = "".join(
        f"<details><summary>after step {row['step']:,}</summary>{_sample(row)}</details>" for row in reversed(rows[-21:-1])
    )
    return f"<section><h2>Samples</h2>{last}{earlier}</section>"


def _sample(row: dict[str, Any]) -> str:
    prompt = html.escape(printable(str(row.get("prompt") or "")))
    return f'<div class="sample"><b>{prompt}</b>{html.escape(printable(row["text"]))}</div>'


def collisions(paths: RunPaths) -> str:
    """Hashed tables: how many keys share a row."""
    found = collision_table(paths.collisions_path)
    if found is None:
        return ""
    rows, note = found
    return f'<section><h2>Hash collisions</h2>{table(HEADS, rows, plain=True)}<p class="note">{note}</p></section>'


def checkpoints(paths: RunPaths) -> str:
    """What there is to go on from, newest first."""
    rows = []
    for step in reversed(committed_steps(paths.checkpoints_path)):
        path = step_path(paths.checkpoints_path, step)
        try:
            tokens = amount(read_meta(paths.checkpoints_path, step).get("tokens")) or ""
        except CheckpointError:
            tokens = "damaged"
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        rows.append((f"{step:,}", tokens, byte_size(size), moment(path.stat().st_mtime), str(path)))
    if not rows:
        return ""
    return f"<section><h2>Checkpoints</h2>{table(('step', 'tokens', 'size', 'saved', 'path'), rows)}</section>"


def origin(history: History) -> str:
    """Where each start took place, and what it ran on."""
    if not history.starts:
        return ""
    names = list(dict.fromkeys(name for start in history.starts for name in start if name not in _START_FIELDS))
    shown = history.starts[-12:]
    heads = ("", *(f"start at step {start['step']:,}" for start in shown))
    rows = [("time", *(moment(start.get("time", 0)) for start in shown))]
    rows += [(name.replace("_", " "), *(_value(start.get(name, "")) for start in shown)) for name in names]
    return f"<section><h2>Versions and machine</h2>{table(heads, rows, plain=True)}</section>"


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value(item)}" for key, item in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def sources(plan: str | None, config: str | None) -> str:
    """The plan and the config, folded up."""
    texts = (("plan.txt", plan, "what was resolved before the run"), ("config.yaml", config, "the whole tree, defaults included"))
    blocks = "".join(
        f"<details><summary>{name}<small>{note}</small></summary><pre>{html.escape(printable(text))}</pre></details>"
        for name, text, note in texts
        if text
    )
    return f"<section><h2>Plan and config</h2>{blocks}</section>" if blocks else ""


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, plain: bool = False) -> str:
    def cells(tag: str, values: Sequence[str]) -> str:
        kinds = ["" if plain else ' class="n"' if index < 3 else ' class="path"' * (index == 4) for index in range(len(values))]
        return "".join(f"<{tag}{kind}>{html.escape(value)}</{tag}>" for value, kind in zip(values, kinds, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="card"><table><thead><tr>{cells("th", heads)}</tr></thead><tbody>{body}</tbody></table></div>'
