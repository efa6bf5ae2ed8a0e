"""compare.html: the table and the curves of all runs in one file that stands alone."""

import html
from collections.abc import Sequence

from mlt.compare.numbers import Numbers
from mlt.compare.table import Cells
from mlt.report.plots import MOST_LINES, Line, Plot, draw
from mlt.report.standalone import standalone

CURVES = (
    ("Train loss", "train/loss", "nats per token", False),
    ("Held-out loss", "eval/loss", "nats per token", True),
    ("Bits per byte, held out", "eval/bits_per_byte", "", True),
    ("Throughput", "throughput/tokens_per_second", "tokens/s", False),
)
WIDE, NARROW = (9.75, 6.3), (4.6, 2.75)


def page(title: str, rows: Cells, lines: Sequence[str], found: Sequence[Numbers]) -> str:
    remarks = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    body = (
        f"<header><h1>{html.escape(title)}</h1></header>\n"
        f'<section><h2>Runs</h2>{_table(rows)}<ul class="note">{remarks}</ul></section>\n{_curves(found)}'
    )
    return standalone(f"{title}: comparison", body, "mlt compare")


def _table(rows: Cells) -> str:
    def line(tag: str, row: Sequence[str]) -> str:
        kinds = ["", *[' class="n"'] * (len(row) - 1)]
        return "".join(f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for kind, cell in zip(kinds, row, strict=True))

    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows[1:])
    return f'<div class="card"><table><thead><tr>{line("th", rows[0])}</tr></thead><tbody>{body}</tbody></table></div>'


def _curves(found: Sequence[Numbers]) -> str:
    """A plot of each metric; runs that are too many for one legend get several."""
    drawn = []
    for group in (found[at : at + MOST_LINES] for at in range(0, len(found), MOST_LINES)):
        for title, metric, unit, marked in CURVES:
            series = [Line(numbers.planned.name, numbers.history.get(metric), marked=marked) for numbers in group]
            plot = Plot(title, series, unit, inches=NARROW if drawn else WIDE)
            if not plot.empty():
                drawn.append(draw(plot))
    return f'<section><h2>Curves</h2><div class="plots">{"".join(drawn)}</div></section>' if drawn else ""
