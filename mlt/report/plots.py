"""Line plots as inline SVG whose colours and fonts come from the page, so that they follow light and dark."""

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlt.report.history import Series, smooth, thin
from mlt.report.text import amount, byte_size, power

# Colours matplotlib draws with, each replaced by a variable of the style sheet.
_VARIABLES = {"#010a0a": "--ink", "#020b0b": "--muted", "#030c0c": "--grid", "#040d0d": "--bad"}
_VARIABLES |= {f"#0{index}0e0e": f"--line{index}" for index in range(1, 7)}
_INK, _MUTED, _GRID, _BAD = list(_VARIABLES)[:4]
_LINES = list(_VARIABLES)[4:]
MOST_LINES = len(_LINES)
"""Lines of a plot that have colours of their own, and a legend."""
SMOOTH_FROM = 60  # points from which a line is drawn smooth over its faint self
_STEPS = (1, 2, 2.5, 5, 10)  # of the axes' ticks
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and set in the page's font
    "font.family": "DejaVu Sans",
    "font.size": 10.0,
    "axes.facecolor": "none",
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": _INK,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "path.simplify": True,
    "path.simplify_threshold": 0.3,
}


@dataclass(frozen=True)
class Line:
    """One line of a plot; `marked` draws its points, `noisy` a moving average over it."""

    label: str
    series: Series
    marked: bool = False
    noisy: bool = True


@dataclass(frozen=True)
class Plot:
    """A titled plot of one quantity over the steps.

    Attributes:
      title: the heading.
      lines: what to draw; lines without points are left out.
      unit: of the values, for the heading.
      from_zero: let the axis start at zero.
      resumes: steps at which the run was resumed.
      tokens_per_step: puts a second axis of tokens on top.
      inches: width and height; the page shows all plots at one scale.
    """

    title: str
    lines: Sequence[Line]
    unit: str = ""
    from_zero: bool = False
    resumes: Sequence[int] = ()
    tokens_per_step: float | None = None
    inches: tuple[float, float] = (4.6, 2.75)

    def empty(self) -> bool:
        """Tell whether there is nothing to draw."""
        return not any(len(line.series) for line in self.lines)


def draw(plot: Plot) -> str:
    """Give a plot as an HTML figure with an inline SVG and a spoken description."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": plot.title}):
        figure = Figure(figsize=plot.inches, layout="constrained")
        figure.patch.set_alpha(0.0)
        _draw_axes(figure.add_subplot(), plot)
        FigureCanvasSVG(figure).print_svg(buffer := io.StringIO(), metadata={"Date": None, "Creator": None})
    unit = f' <span class="unit">{html.escape(plot.unit)}</span>' if plot.unit else ""
    heading = f"<figcaption><b>{html.escape(plot.title)}</b>{unit}{_legend(plot)}</figcaption>"
    return f"<figure>{heading}{_inline(buffer.getvalue(), describe(plot))}</figure>"


def describe(plot: Plot) -> str:
    """Say in words what a plot shows."""
    parts = []
    for line in plot.lines[:4]:
        series = line.series.finite()
        if len(series):
            first, last = series.values[0], series.values[-1]
            parts.append(
                f"{line.label}: {first:.4g} at step {series.steps[0]:.0f}, {last:.4g} at step {series.steps[-1]:.0f}, "
                f"lowest {series.values.min():.4g}, highest {series.values.max():.4g}"
            )
    return f"{plot.title} over steps. " + "; ".join(parts)


def _draw_axes(axes: Any, plot: Plot) -> None:
    from matplotlib.ticker import MaxNLocator

    lines = [line for line in plot.lines if len(line.series)]
    alpha = 1.0 if len(lines) <= len(_LINES) else max(0.25, 3 / len(lines))
    drawn: list[np.ndarray] = []
    for index, line in enumerate(lines):
        colour = _LINES[index % len(_LINES)] if len(lines) <= len(_LINES) else _LINES[0]
        series = line.series.finite()
        faint = len(series) >= SMOOTH_FROM and len(lines) <= len(_LINES) and line.noisy and not line.marked
        if faint:
            raw = thin(series)
            axes.plot(raw.steps, raw.values, color=colour, alpha=0.28, linewidth=0.9)
        shown = thin(smooth(series) if faint else series)
        marker = "o" if line.marked or len(shown) < 12 else None
        axes.plot(shown.steps, shown.values, color=colour, alpha=alpha, linewidth=1.7, marker=marker, markersize=3.4)
        drawn.append(series.values)
        bad = line.series.steps[~np.isfinite(line.series.values)]
        if len(bad):
            height = np.full(len(bad), 0.03)
            axes.plot(bad, height, "x", color=_BAD, markersize=6, transform=axes.get_xaxis_transform())
    values = np.concatenate(drawn) if drawn else np.zeros(0)
    _set_scale(axes, values, plot)
    for step in plot.resumes:
        axes.axvline(step, color=_MUTED, linewidth=0.9, linestyle=(0, (2, 3)))
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    last = max(line.series.steps[-1] for line in lines)
    axes.set_xlim(min(0, *(line.series.steps[0] for line in lines)) - 0.01 * last, max(1.0, 1.01 * last))
    axes.xaxis.set_major_locator(MaxNLocator(max(3, round(plot.inches[0])), steps=_STEPS, integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: amount(value))
    if plot.inches[1] > 2:
        axes.set_xlabel("step")
    if plot.tokens_per_step:
        rate = plot.tokens_per_step
        top = axes.secondary_xaxis("top", functions=(lambda step: step * rate, lambda tokens: tokens / rate))
        top.xaxis.set_major_formatter(lambda value, _: amount(value))
        top.set_xlabel("tokens")
        top.spines["top"].set_visible(False)


def _set_scale(axes: Any, values: np.ndarray, plot: Plot) -> None:
    """Choose a logarithmic axis for a wide range, and keep a lone spike from flattening everything else."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    if not len(values):
        axes.set_yticks([])
        return
    low, high = float(values.min()), float(values.max())
    name = (
        byte_size if plot.title.endswith("_bytes") else amount if high >= 1000 else power if 0 < high < 0.01 else "{:.6g}".format
    )
    if low > 0 and high / low > 50 and not plot.from_zero:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if np.log10(high / low) < 0.85 * plot.inches[1] else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        usual, bottom = float(np.quantile(values, 0.995)), 0.0 if plot.from_zero and low >= 0 else low
        axes.yaxis.set_major_locator(MaxNLocator(max(3, round(1.6 * plot.inches[1])), steps=_STEPS))
        if high - low <= 1e-6 * abs(high):
            axes.set_ylim(*sorted((0.9 * high, 1.1 * high)) if high else (-1, 1))
        elif len(values) >= 200 and high - bottom > 3 * (usual - bottom) > 0:
            margin = 0.08 * (usual - bottom)
            axes.set_ylim(bottom if plot.from_zero else bottom - margin, usual + margin)
            note = {"xycoords": "axes fraction", "ha": "right", "va": "top", "color": _BAD}
            axes.annotate(f"up to {name(high)}", (1, 1), **note)
        elif bottom == 0.0:
            axes.set_ylim(bottom=0.0)
    axes.yaxis.set_major_formatter(lambda value, _: name(value))


def _legend(plot: Plot) -> str:
    lines = [line for line in plot.lines if len(line.series)]
    if len(lines) < 2 or len(lines) > len(_LINES):
        return ""
    keys = (f'<span class="key k{index + 1}">{html.escape(line.label)}</span>' for index, line in enumerate(lines))
    return f'<span class="legend">{"".join(keys)}</span>'


def _inline(svg: str, description: str) -> str:
    """Make a stand-alone SVG part of a page: no prologue, no fixed size, no style of its own, colours as variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font-family: [^;\"]*; ?", "", svg)
    svg = re.sub(r'font: ([\d.]+)px [^;"]*', r"font-size: \1px", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    box = re.search(r'viewBox="[^"]*"', svg)
    body = svg[svg.index(">") + 1 :]
    label = html.escape(description, quote=True)
    return f'<svg role="img" aria-label="{label}" {box.group() if box else ""}><title>{label}</title>{body}'
