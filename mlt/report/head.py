"""The head of a run's report: its name and state, its last numbers, and what a reader must not overlook."""

import html

import numpy as np

from mlt.checkpoint.layout import committed_steps
from mlt.report.goodput import Account
from mlt.report.history import History, Series
from mlt.report.text import amount, byte_size, duration, moment, number
from mlt.run_paths import RunPaths


def header(name: str, paths: RunPaths, history: History, total: int | None, account: Account) -> str:
    """Name, state, tiles and warnings.

    Args:
      total: steps the run is to do; None where nothing says so.
      account: where the time went.
    """
    done = max(history.last_step(), *committed_steps(paths.checkpoints_path), 0)
    label, tone = _status(done, total, paths.in_use())
    share = f'<div class="bar"><i style="width:{100 * min(done / total, 1):.1f}%"></i></div>' if total else ""
    started = f"started {moment(history.starts[0]['time'])}" if history.starts and "time" in history.starts[0] else ""
    machine = history.fact("device")
    where = f"{history.fact('num_devices') or 1} x {machine}" if machine else ""
    line = " &middot; ".join(html.escape(part) for part in (str(paths.path.absolute()), started, where) if part)
    return (
        f'<header><h1>{html.escape(name)}<span class="status {tone}">{html.escape(label)}</span></h1><p>{line}</p>{share}'
        f"</header>\n{_tiles(history, done, total, account)}{_warnings(history)}"
    )


def _status(done: int, total: int | None, in_use: bool) -> tuple[str, str]:
    if total is not None and done >= total:
        return "complete", "good"
    if in_use:
        return "running", "wait"
    return (f"stopped at step {done:,}", "bad") if done else ("no step yet", "bad")


def _tiles(history: History, done: int, total: int | None, account: Account) -> str:
    speed, mfu = history.get("throughput/tokens_per_second").finite(), history.get("throughput/mfu").finite()
    tokens, memory = history.get("train/tokens").last(), history.get("memory/peak_bytes").finite()
    program = history.get("memory/program_bytes").finite()
    resumed = len(history.starts) - 1
    tiles = [
        ("steps", f"{done:,}", f"of {total:,}" if total else ""),
        ("tokens", amount(tokens), ""),
        ("time", duration(history.seconds), f"{resumed} restart{'s' * (resumed > 1)}" if resumed > 0 else ""),
        ("train loss", *_final(history.get("train/loss"))),
        ("eval loss", *_final(history.get("eval/loss"))),
        ("bits per byte", *_final(history.get("eval/bits_per_byte"))),
        ("tokens/s", amount(float(np.median(speed.values))) if len(speed) else None, "median"),
        ("MFU", f"{100 * np.median(mfu.values):.1f} %" if len(mfu) else None, "median"),
        ("goodput", f"{100 * account.goodput:.0f} %" if account.total else None, "of the time"),
        ("peak memory", byte_size(memory.values.max()) if len(memory) else None, "per device"),
        ("program memory", byte_size(program.values.max()) if len(program) else None, "per device, as compiled"),
    ]
    shown = (
        f"<div><dt>{html.escape(title)}</dt><dd>{html.escape(value)}</dd><small>{html.escape(note)}</small></div>"
        for title, value, note in tiles
        if value is not None
    )
    return f'<dl class="tiles">{"".join(shown)}</dl>'


def _final(series: Series) -> tuple[str | None, str]:
    finite = series.finite()
    if not len(finite):
        return None, ""
    best = finite.values.min()
    return number(finite.values[-1]), "lowest yet" if finite.values[-1] <= best else f"lowest {number(best)}"


def _warnings(history: History) -> str:
    parts = []
    for name, bad in history.not_finite().items():
        steps = f"step {bad[0]:,.0f}" if len(bad) == 1 else f"{len(bad)} steps, first at {bad[0]:,.0f}"
        parts.append(f"<b>{html.escape(name)}</b> is not finite at {steps}")
    for row in history.rollbacks:
        parts.append(f"the run went back from step {row.get('from_step', 0):,} to step {row['step']:,}")
    for name, series in history.series.items():
        if name.startswith("alarm/") and len(series):
            parts.append(f"<b>{html.escape(name)}</b> raised, last at step {series.steps[-1]:,.0f}")
    return f'<p class="warning" role="alert">{"; ".join(parts)}.</p>' if parts else ""
