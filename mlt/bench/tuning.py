"""The search for block sizes: one kernel after another, one size after another, each kept if the whole call gets faster.

All sizes of all kernels of a call at once would be thousands of programs. Its kernels run one behind the other, so a kernel's
best sizes hardly depend on the others': coordinate descent, once through, tries some ten programs a kernel, those of the
forward pass first. The clock is that of the benches, on forward and backward together, since some kernels run in both.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from mlt_kernels import tuned
from mlt_kernels.tuned import Key, Sizes

from mlt.bench import accelerator
from mlt.bench.rows import Row

GAIN = 0.98
"""A candidate must be this much faster than the best before it: less may be the clock."""
STAGES = (1, 2, 3, 4)
Kernels = dict[Key, Sizes]


@dataclasses.dataclass
class Found:
    """The sizes of a call's kernels after a search, and how it went. Seconds are of the rule and of the best, both passes."""

    sizes: Kernels
    rule: float | None = None
    best: float | None = None
    tried: int = 0
    refused: list[str] = dataclasses.field(default_factory=list)  # why each candidate that has no time has none


def asked(row: Row, backend: str) -> tuple[Kernels, str]:
    """The kernels that a row launches with their rules' sizes, forward pass first; and whether it lowers, or why it does not."""
    with tuned.trying({}), tuned.asked() as found:
        answer = accelerator.lowered(row, backend)
    return found, answer


def values(key: Key, name: str, size: int) -> list[int]:
    """Other values of a size that a table may hold: stages from 1 to 4, else a quarter to four times as much."""
    kernel = tuned.KERNELS[key.op, key.backend][key.kernel]
    near = STAGES if name.endswith("stages") else (size // 4, size // 2, size * 2, size * 4)
    return [value for value in near if value != size and tuned.refused(kernel, name, value, dict(key.shape)) is None]


def candidates(key: Key, sizes: Sizes) -> Iterator[Sizes]:
    """Every choice that differs from `sizes` in one size."""
    for name, size in sizes.items():
        for value in values(key, name, size):
            yield sizes | {name: value}


def descend(rules: Kernels, seconds: Callable[[Mapping[Key, Sizes]], tuple[float | None, str]]) -> Found:
    """Searches from the rules' sizes on. `seconds` gives the time of a call whose kernels have these sizes, or None and why."""
    found = Found({key: dict(sizes) for key, sizes in rules.items()})
    least, why = seconds(found.sizes)
    found.rule = least
    if least is None:
        found.refused.append(why)
        return found
    for key in rules:
        for name, size in rules[key].items():
            for value in values(key, name, size):
                trial = found.sizes | {key: found.sizes[key] | {name: value}}
                taken, why = seconds(trial)
                found.tried += 1
                if taken is None:
                    found.refused.append(f"{key.kernel} {name}={value}: {why}")
                elif taken < GAIN * least:
                    found.sizes, least = trial, taken
    found.best = least
    return found


def lines(found: Found, row: Row) -> list[dict[str, Any]]:
    """The lines of a table: what `mlt_kernels.tuned` reads, and the row that they were measured on."""
    return [
        {"op": key.op, "backend": key.backend, "kernel": key.kernel, "shape": dict(key.shape), "sizes": sizes, "row": row.name}
        for key, sizes in found.sizes.items()
    ]


def search(row: Row, backend: str, rules: Kernels, known: Kernels) -> Found:
    """Measures on this machine. Kernels in `known` keep their sizes and are not searched."""
    wanted = accelerator.portable(row)

    def seconds(sizes: Mapping[Key, Sizes]) -> tuple[float | None, str]:
        with tuned.trying({**known, **sizes}):
            measured = accelerator.tried(row, backend, wanted)
        return (None, measured.why) if measured.why else (measured.both, "")

    found = descend(rules, seconds)
    jax.clear_caches()
    return found
