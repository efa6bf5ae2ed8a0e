"""What a compiled program sends between devices: kind, count and bytes of every collective, loops counted in full."""

import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
_BYTES |= {"f64": 8, "s64": 8, "u64": 8, "c64": 8, "c128": 16}
_ARRAY = re.compile(r"\b(" + "|".join(_BYTES) + r")\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_COLLECTIVE = re.compile(r"= (.*?) (" + "|".join(KINDS) + r")(?:-start)?\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_COUNTED = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}")
_SOURCE = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """Attributes:
    kind: one of `KINDS`.
    shapes: (type, dims) of each array that it gives on one device.
    times: executions in one run of the program.
    source: what in the traced program it came from.
    group: devices that take part together; None where the program names pairs of them, or all.
    """

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    times: int
    source: str
    group: int | None = None

    @property
    def bytes(self) -> int:
        """Bytes of the result on one device, over all executions."""
        return self.times * sum(_BYTES[kind] * math.prod(dims) for kind, dims in self.shapes)


def collectives(program: str) -> list[Collective]:
    """Every collective of a compiled program, from its text (`compiled.as_text()`).

    The body of a loop counts as often as the compiler knows it to run; one of unknown length counts once.
    """
    computations, entry = _computations(program)
    return list(_walk(computations, entry, 1))


def summary(found: list[Collective]) -> str:
    """One line a kind: executions and bytes in one run on one device, and what of it loops over layers repeat."""
    lines = []
    for kind in KINDS:
        own = [c for c in found if c.kind == kind]
        looped = [c for c in own if c.times > 1]
        if own:
            inside = f"   in loops {sum(c.times for c in looped)} times {sum(c.bytes for c in looped):,d} bytes" if looped else ""
            lines.append(f"{kind:<20} {sum(c.times for c in own):6d} times {sum(c.bytes for c in own):14,d} bytes{inside}")
    return "\n".join(lines) or "no collectives"


def _computations(program: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    entry, name = "", ""
    for line in program.splitlines():
        start = _COMPUTATION.match(line)
        if start and "=" not in line.split("(")[0]:
            name = start.group(2)
            bodies[name] = []
            entry = name if start.group(1) else entry
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _walk(computations: dict[str, list[str]], name: str, times: int) -> Iterator[Collective]:
    for line in computations.get(name, ()):
        found = _COLLECTIVE.search(line)
        if found and _group_size(line) != 1:
            yield Collective(
                found.group(2), _shapes(found.group(2), found.group(1), line), times, _source(line), _group_size(line)
            )
        if found:
            continue
        trips = _TRIPS.search(line)
        inner = times * (int(trips.group(1)) if trips and " while(" in line else 1)
        for called in _CALLED.findall(line):
            yield from _walk(computations, called, inner)
        for branches in _BRANCHES.findall(line):
            for branch in branches.split(","):
                yield from _walk(computations, branch.strip().lstrip("%"), inner)


def _group_size(line: str) -> int | None:
    """Devices of a group; None where the line names pairs of devices instead, or all of them."""
    if counted := _COUNTED.search(line):
        return int(counted.group(1))
    if named := _NAMED.search(line):
        sizes = dict(part.replace("'", "").split("=") for part in named.group(1).split(","))
        return math.prod(int(sizes[axis.strip().strip("'")]) for axis in named.group(2).split(",") if axis.strip())
    if listed := _LISTED.search(line):
        return len(listed.group(1).split(","))
    return None


def _shapes(kind: str, result: str, line: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Type and dims of each result. The asynchronous form gives (operands, results, ...), but for a sum, which gives results."""
    if "-start(" in line and kind != "all-reduce" and result.startswith("("):
        result = _elements(result)[1]
    return tuple((kind, tuple(int(n) for n in dims.split(",") if n)) for kind, dims in _ARRAY.findall(result))


def _elements(text: str) -> list[str]:
    """The elements of a tuple type."""
    found, depth = [""], 0
    for letter in text[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return found


def _source(line: str) -> str:
    found = _SOURCE.search(line)
    return found.group(1) if found else ""
