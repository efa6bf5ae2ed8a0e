"""The report of `error_table.py`: what was measured of each op as Markdown, in a section with its own date and command."""

import dataclasses
import datetime
import itertools
import pathlib
import sys

import jax
import numpy as np

from mlt.bench import gate

SHAKES = 8
AMPLIFIED, STRESSED = 3.0, 10.0
"""An error is the inputs' own if it is at most this many times what one unit in their last place moves: the most of SHAKES
draws, where the worst direction is not among them and an op rounds more than its inputs. More for the harsher cases."""


@dataclasses.dataclass
class Line:
    """Worst errors of one backend, type and condition over the cases it applies to."""

    backend: str
    dtype: str
    condition: str
    factor: float = AMPLIFIED
    cases: int = 0
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    where: dict[str, str] = dataclasses.field(default_factory=dict)
    ranks: dict[str, tuple[bool, float]] = dataclasses.field(default_factory=dict)  # (unexplained, error), the worst counts

    def add(self, case: str, errors: dict[str, float], moved: dict[str, float]) -> None:
        """Errors of a case; of those above the limit what `moved` explains gives way to what it does not."""
        self.cases += 1
        for name, error in errors.items():
            amplified = self.limit < error <= self.factor * moved.get(name, 0.0)
            rank = (not error <= self.limit and not amplified, np.inf if np.isnan(error) else error)
            if rank > self.ranks.get(name, (False, -1.0)):
                self.ranks[name], self.errors[name], self.where[name] = rank, error, case

    @property
    def limit(self) -> float:
        return gate.LIMITS[self.dtype]

    def bad(self) -> list[str]:
        return [name for name, (unexplained, _) in self.ranks.items() if unexplained]


@dataclasses.dataclass(frozen=True)
class Amplified:
    """A value of one case above its limit, and what one unit in the last place of the inputs moves it by."""

    dtype: str
    condition: str
    case: str
    name: str
    errors: dict[str, float]  # by backend
    moved: float


@dataclasses.dataclass
class Table:
    """Lines of one list of cases, what the inputs' last place decides, and why each backend that did not run did not."""

    title: str
    lines: list[Line]
    amplified: list[Amplified]
    refused: dict[str, str]


def section(op: str, tables: list[Table], command: str) -> str:
    """Markdown of one op."""
    bad = sum(len(line.bad()) for table in tables for line in table.lines)
    text = (
        f"## {op}\n\n{datetime.date.today().isoformat()}, JAX {jax.__version__}, NumPy {np.__version__}, Python "
        f"{sys.version.split()[0]}. Command: `{command}`. Above its limit: {bad} values (`!`).\n"
    )
    for table in tables:
        names = list(dict.fromkeys(name for line in table.lines for name in line.errors))
        rows = [["backend", "type", "inputs", "cases", *names], ["---"] * (4 + len(names))]
        for line in table.lines:
            cells = ["" if name not in line.errors else _cell(line, name) for name in names]
            rows.append([line.backend, line.dtype, line.condition, str(line.cases), *cells])
        if table.title:
            text += f"\n### {table.title}\n"
        if table.lines:
            text += "\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"
        text += amplified_table(table.amplified)
        text += "".join(f"\n`{name}` did not run: {why}\n" for name, why in table.refused.items())
    return text


def _cell(line: Line, name: str) -> str:
    error = line.errors[name]
    if error <= line.limit:
        return f"{error:.1e}"
    return f"**{error:.1e} !** ({line.where[name]})" if name in line.bad() else f"{error:.1e} ~ ({line.where[name]})"


def amplified_table(found: list[Amplified]) -> str:
    """Of each case with values above the limit: how many, and the one furthest beyond what the inputs' last place moves."""
    if not found:
        return ""
    backends = list(found[0].errors)
    heads = ["type", "inputs", "case", "above", "value", *backends, "inputs shaken by one ulp move it by", "error / that"]
    rows = [heads, ["---"] * len(heads)]
    for (dtype, condition, case), group in itertools.groupby(found, key=lambda a: (a.dtype, a.condition, a.case)):
        values = list(group)
        worst = max(values, key=_ratio)
        errors = [f"{worst.errors[backend]:.1e}" for backend in backends]
        rows.append([dtype, condition, case, str(len(values)), worst.name, *errors, f"{worst.moved:.1e}", f"{_ratio(worst):.1f}"])
    lines = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    head = "Cases with values above the limit, each by the value whose error is the largest multiple of what moves it"
    return f"\n{head}:\n\n{lines}\n"


def _ratio(value: Amplified) -> float:
    """The largest error above the limit over what one unit in the last place moves."""
    above = [error for error in value.errors.values() if not error <= gate.LIMITS[value.dtype]]
    return max(above) / value.moved if value.moved else float("inf")


def report(sections: dict[str, str]) -> str:
    device = jax.devices()[0]
    limits = ", ".join(f"{limit:.0e} in {name}" for name, limit in gate.LIMITS.items())
    head = (
        f"# Errors against float64 on {device.device_kind or device.platform}\n\n"
        "Each value is max |difference| / max |expected| of an array, the worst over the cases: the result `out`, the other "
        "results (states, log-sum-exp) `more`, and the gradient `d x` in every floating argument for a normal cotangent, "
        f"against the op's reference on the same numbers in float64. Limits: {limits}. `!` marks a value above its limit.\n\n"
        "`~` marks a value above its limit that says more of the inputs than of the backend: in float64 the same result moves by "
        f"at least 1 / {AMPLIFIED:.0f} of that when every input moves to the next number of its type (most of {SHAKES} draws), "
        f"1 / {STRESSED:.0f} under stress. What is above a limit is listed case by case below its op.\n\n"
    )
    return head + "\n".join(sections[op] for op in sorted(sections))


def sections_of(path: pathlib.Path) -> dict[str, str]:
    """The sections of a report by op; of one that is not there, none."""
    if not path.exists():
        return {}
    parts = path.read_text().split("\n## ")[1:]
    return {part.partition("\n")[0]: "## " + part.rstrip("\n") + "\n" for part in parts}
