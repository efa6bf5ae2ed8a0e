"""The plots of a run's report: the curves that every run has, and everything else that was logged."""

import re
from collections.abc import Sequence

from mlt.report.history import History, Series, families, wait_share
from mlt.report.plots import SMOOTH_FROM, Line, Plot, draw

_SMALL_PLOTS = 60
_LOSS_INCHES, _SMALL_INCHES = (9.75, 6.3), (3.15, 1.9)
_MAIN_METRICS = (
    *("train/loss", "train/learning_rate", "train/grad_norm", "train/tokens"),
    *("eval/loss", "eval/bits_per_byte", "eval/tokens", "eval/generic_loss"),
    *("throughput/tokens_per_second", "throughput/step_seconds", "data/wait_seconds"),
    *("throughput/mfu", "throughput/goodput", "memory/peak_bytes", "memory/program_bytes"),
)


def curves(history: History) -> str:
    """Loss, speed, gradient norm, learning rate and waiting, over the steps."""
    resumes = history.resumes()
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
    if history.not_finite():
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


def more_metrics(history: History) -> str:
    """Every other metric, small; those whose names differ in their numbers in one plot."""
    resumes = history.resumes()
    silent = {name for name, series in history.series.items() if name.startswith("guard/") and not series.values.any()}
    groups = families(sorted(name for name in history.series if name not in _MAIN_METRICS and name not in silent))
    plots = []
    for title, names in groups.items():
        unit = f"{len(names)} of them" if len(names) > 1 else ""
        lines = [Line(label, history.get(name)) for label, name in zip(_labels(names), names, strict=True)]
        plots.append(Plot(title, lines, unit, resumes=resumes, inches=_SMALL_INCHES))
    if not plots:
        return ""
    left = len(plots) - _SMALL_PLOTS
    note = f'<p class="note">{left} more metrics are in metrics.jsonl.</p>' if left > 0 else ""
    drawn = "".join(draw(plot) for plot in plots[:_SMALL_PLOTS])
    return f'<section><h2>More metrics</h2><div class="small">{drawn}</div>{note}</section>'


def _labels(names: Sequence[str]) -> list[str]:
    """What tells names apart that differ in their numbers: "layers 1", the word in front of each number that differs."""
    found = [re.findall(r"([A-Za-z_]*)\.?(\d+)", name) for name in names]
    differing = [at for at in range(len(found[0])) if len({numbers[at] for numbers in found}) > 1]
    return [
        " ".join(" ".join(numbers[at]).strip() for at in differing) or name for name, numbers in zip(names, found, strict=True)
    ]
