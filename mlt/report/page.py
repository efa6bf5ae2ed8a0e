"""The run report: one HTML file that stands alone, made of what the run directory holds."""

import html
import re
import time
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mlt.checkpoint.layout import CheckpointError, committed_steps, read_meta, step_path
from mlt.errors import UserError
from mlt.report.collisions import HEADS, collision_table
from mlt.report.goodput import CAUSES, Account
from mlt.report.history import History, Series, families, read_account, read_history, read_rows, wait_share
from mlt.report.plots import SMOOTH_FROM, Line, Plot, draw
from mlt.report.text import amount, byte_size, duration, moment, number, printable
from mlt.run_paths import RunPaths, write_whole

_SMALL_PLOTS = 60
_LOSS_INCHES, _SMALL_INCHES = (9.75, 6.3), (3.15, 1.9)
_MAIN_METRICS = (
    *("train/loss", "train/learning_rate", "train/grad_norm", "train/tokens"),
    *("eval/loss", "eval/bits_per_byte", "eval/tokens", "eval/generic_loss"),
    *("throughput/tokens_per_second", "throughput/step_seconds", "data/wait_seconds"),
    *("throughput/mfu", "throughput/goodput", "memory/peak_bytes", "memory/program_bytes"),
)
_START_FIELDS = ("kind", "step", "time", "steps", "first_step")


def write_report(run_dir: str | Path) -> Path:
    """Write <run_dir>/report.html from the config, metrics, samples, plan and checkpoints found there.

    Any of them may be missing or cut off by a crash; the report says what it found.

    Returns:
      The path of the page.

    Raises:
      UserError: `run_dir` is no directory with a run, or the page cannot be written.
    """
    paths = RunPaths(run_dir)
    if not (paths.config_path.exists() or paths.metrics_path.exists()):
        raise UserError(f"{paths.path} holds no run: neither {paths.config_path.name} nor {paths.metrics_path.name} is there")
    try:
        write_whole(paths.report_path, _page(paths))
    except OSError as error:
        raise UserError(
            f"cannot write {paths.report_path}: {error.strerror}; free space, change the rights, or copy the run elsewhere"
        ) from error
    return paths.report_path


def _page(paths: RunPaths) -> str:
    history = read_history(paths.metrics_path)
    config = _read(paths.config_path)
    name = paths.path.absolute().name
    body = "\n".join(
        [
            _header(name, paths, history, _total_steps(history, config)),
            _curves(history),
            _time(read_account(paths.logs_path / "goodput.jsonl")),
            _more(history),
            _samples(paths),
            _collisions(paths),
            _checkpoints(paths),
            _origin(history),
            _sources(_read(paths.plan_path), config),
        ]
    )
    style = resources.files("mlt.report").joinpath("page.css").read_text()
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(name)}: run report</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}\n"
        f"<footer>Written {moment(time.time())} by <code>mlt report {html.escape(str(paths.path))}</code></footer>\n"
        "</main>\n</body>\n</html>\n"
    )


def _header(name: str, paths: RunPaths, history: History, total: int | None) -> str:
    done = max(history.last_step(), *committed_steps(paths.checkpoints_path), 0)
    label, tone = _status(done, total, paths.in_use())
    share = f'<div class="bar"><i style="width:{100 * min(done / total, 1):.1f}%"></i></div>' if total else ""
    started = f"started {moment(history.starts[0]['time'])}" if history.starts and "time" in history.starts[0] else ""
    machine = history.fact("device")
    where = f"{history.fact('num_devices') or 1} x {machine}" if machine else ""
    line = " &middot; ".join(html.escape(part) for part in (str(paths.path.absolute()), started, where) if part)
    return (
        f'<header><h1>{html.escape(name)}<span class="status {tone}">{html.escape(label)}</span></h1><p>{line}</p>{share}'
        f"</header>\n{_tiles(history, done, total)}{_warnings(history)}"
    )


def _status(done: int, total: int | None, in_use: bool) -> tuple[str, str]:
    if total is not None and done >= total:
        return "complete", "good"
    if in_use:
        return "running", "wait"
    return (f"stopped at step {done:,}", "bad") if done else ("no step yet", "bad")


def _tiles(history: History, done: int, total: int | None) -> str:
    speed, mfu = history.get("throughput/tokens_per_second").finite(), history.get("throughput/mfu").finite()
    tokens, memory = history.get("train/tokens").last(), history.get("memory/peak_bytes").finite()
    program, goodput = history.get("memory/program_bytes").finite(), history.get("throughput/goodput").last()
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
        ("goodput", f"{100 * goodput:.0f} %" if goodput is not None else None, "of the time"),
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
    return number(finite.values[-1]), "lowest" if finite.values[-1] <= best else f"lowest {number(best)}"


def _warnings(history: History) -> str:
    parts = []
    for name, bad in _not_finite(history).items():
        steps = f"step {bad[0]:,.0f}" if len(bad) == 1 else f"{len(bad)} steps, first at {bad[0]:,.0f}"
        parts.append(f"<b>{html.escape(name)}</b> is not finite at {steps}")
    for row in history.rollbacks:
        parts.append(f"the run went back from step {row.get('from_step', 0):,} to step {row['step']:,}")
    for name, series in history.series.items():
        if name.startswith("alarm/") and len(series):
            parts.append(f"<b>{html.escape(name)}</b> raised, last at step {series.steps[-1]:,.0f}")
    return f'<p class="warning" role="alert">{"; ".join(parts)}.</p>' if parts else ""


def _not_finite(history: History) -> dict[str, np.ndarray]:
    """Metric -> steps at which it was NaN or infinite."""
    bad = {name: series.steps[~np.isfinite(series.values)] for name, series in history.series.items()}
    return {name: steps for name, steps in bad.items() if len(steps)}


def _curves(history: History) -> str:
    resumes = [int(start["step"]) for start in history.starts[1:]]
    loss = [Line("train", history.get("train/loss")), Line("held out", history.get("eval/loss"), marked=True)]
    generic = history.get("eval/generic_loss")
    loss += [Line("held out, generic block", generic, marked=True)] if len(generic) else []
    rest = (
        ("Bits per byte, held out", "", Line("eval", history.get("eval/bits_per_byte"), marked=True), False),
        ("Throughput", "tokens/s", Line("tokens/s", history.get("throughput/tokens_per_second")), True),
        ("Gradient norm", "", Line("gradient norm", history.get("train/grad_norm")), False),
        ("Learning rate", "", Line("learning rate", history.get("train/learning_rate"), noisy=False), True),
        ("Waiting for data", "% of the time", Line("wait", wait_share(history)), True),
    )
    plots = [
        Plot("Loss", loss, "nats per token", False, resumes, _tokens_per_step(history.get("train/tokens")), _LOSS_INCHES),
        *(Plot(title, [line], unit, from_zero, resumes) for title, unit, line, from_zero in rest),
    ]
    drawn = [draw(plot) for plot in plots if not plot.empty()]
    if not drawn:
        return (
            '<section><h2>Curves</h2><p class="card">No metrics yet: the run ended, or was looked at, before its first '
            "logged step.</p></section>"
        )
    notes = []
    if any(len(line.series) >= SMOOTH_FROM for plot in plots for line in plot.lines):
        notes.append("Faint: as logged. Bold: moving average.")
    if _not_finite(history):
        notes.append("Crosses: values that were not finite.")
    if resumes:
        notes.append("Dotted lines: the run was resumed.")
    note = f'<p class="note">{" ".join(notes)}</p>' if notes else ""
    return f'<section><h2>Curves</h2><div class="plots">{"".join(drawn)}</div>{note}</section>'


def _tokens_per_step(tokens: Series) -> float | None:
    """Tokens of a step where that is the same all along."""
    finite = tokens.finite()
    if not len(finite) or finite.steps[-1] <= 0 or finite.values[-1] <= 0:
        return None
    rate = finite.values[-1] / finite.steps[-1]
    return float(rate) if (abs(finite.values - rate * finite.steps) <= 0.01 * finite.values[-1]).all() else None


def _more(history: History) -> str:
    resumes = [int(start["step"]) for start in history.starts[1:]]
    silent = {name for name, series in history.series.items() if name.startswith("guard/") and not series.values.any()}
    groups = families(sorted(name for name in history.series if name not in _MAIN_METRICS and name not in silent))
    plots = []
    for title, names in groups.items():
        unit = f"{len(names)} of them" if len(names) > 1 else ""
        lines = [Line(" ".join(re.findall(r"\d+", name)) if unit else name, history.get(name)) for name in names]
        plots.append(Plot(title, lines, unit, resumes=resumes, inches=_SMALL_INCHES))
    if not plots:
        return ""
    left = len(plots) - _SMALL_PLOTS
    note = f'<p class="note">{left} more metrics are in metrics.jsonl.</p>' if left > 0 else ""
    drawn = "".join(draw(plot) for plot in plots[:_SMALL_PLOTS])
    return f'<section><h2>More metrics</h2><div class="small">{drawn}</div>{note}</section>'


def _time(account: Account) -> str:
    """Where the time of all starts went, as a bar and a table."""
    spent = {cause: seconds for cause, seconds in account.seconds.items() if seconds > 0}
    if not account.total:
        return ""
    bar = "".join(
        f'<i class="{"good" if cause == "step" else "c" + str(index % 4)}" style="width:{100 * seconds / account.total:.2f}%" '
        f'title="{html.escape(CAUSES.get(cause, cause))}"></i>'
        for index, (cause, seconds) in enumerate(spent.items())
    )
    order = sorted(spent, key=lambda cause: -spent[cause])
    rows = [(CAUSES.get(cause, cause), duration(spent[cause]), f"{100 * spent[cause] / account.total:.1f} %") for cause in order]
    down = f" Not counted: {duration(account.down)} between a process and the next." if account.down >= 1 else ""
    note = (
        f"Goodput {100 * account.goodput:.1f} %: time of training steps that the model keeps, over all the time of its processes."
    )
    return (
        f'<section><h2>Where the time went</h2><div class="spent">{bar}</div>{_table(("", "time", "share"), rows)}'
        f'<p class="note">{note}{down}</p></section>'
    )


def _samples(paths: RunPaths) -> str:
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


def _collisions(paths: RunPaths) -> str:
    found = collision_table(paths.collisions_path)
    if found is None:
        return ""
    rows, note = found
    return f'<section><h2>Hash collisions</h2>{_table(HEADS, rows, plain=True)}<p class="note">{note}</p></section>'


def _checkpoints(paths: RunPaths) -> str:
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
    return f"<section><h2>Checkpoints</h2>{_table(('step', 'tokens', 'size', 'saved', 'path'), rows)}</section>"


def _origin(history: History) -> str:
    """Where each start took place, and what it ran on."""
    if not history.starts:
        return ""
    names = list(dict.fromkeys(name for start in history.starts for name in start if name not in _START_FIELDS))
    shown = history.starts[-12:]
    heads = ("", *(f"start at step {start['step']:,}" for start in shown))
    rows = [("time", *(moment(start.get("time", 0)) for start in shown))]
    rows += [(name.replace("_", " "), *(_value(start.get(name, "")) for start in shown)) for name in names]
    return f"<section><h2>Versions and machine</h2>{_table(heads, rows, plain=True)}</section>"


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value(item)}" for key, item in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, plain: bool = False) -> str:
    def cells(tag: str, values: Sequence[str]) -> str:
        kinds = ["" if plain else ' class="n"' if index < 3 else ' class="path"' * (index == 4) for index in range(len(values))]
        return "".join(f"<{tag}{kind}>{html.escape(value)}</{tag}>" for value, kind in zip(values, kinds, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="card"><table><thead><tr>{cells("th", heads)}</tr></thead><tbody>{body}</tbody></table></div>'


def _sources(plan: str | None, config: str | None) -> str:
    """The plan and the config, folded up."""
    texts = (("plan.txt", plan, "what was resolved before the run"), ("config.yaml", config, "the whole tree, defaults included"))
    blocks = "".join(
        f"<details><summary>{name}<small>{note}</small></summary><pre>{html.escape(printable(text))}</pre></details>"
        for name, text, note in texts
        if text
    )
    return f"<section><h2>Plan and config</h2>{blocks}</section>" if blocks else ""


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None


def _total_steps(history: History, config: str | None) -> int | None:
    """Steps the run is to do: as its last start said, else as its config says."""
    total = history.fact("steps")
    if total is None and config:
        try:
            total = yaml.safe_load(config)["train"]["steps"]
        except (yaml.YAMLError, KeyError, TypeError):
            return None
    return total if isinstance(total, int) and total > 0 else None
