"""The texts of `mlt checkpoint`: tables of what `catalog` and `compare` find."""

import base64
import io
import json
import math
import shutil
import sys
import time

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from mlt.checkpoint.catalog import Catalog, Entry, open_catalog, open_one
from mlt.checkpoint.compare import differences, verify
from mlt.checkpoint.layout import Record, StepFiles
from mlt.checkpoint.leaves import Leaf

_SHOWN = 40  # differences that are printed
_PLAIN_WIDTH = 200  # of a pipe or a file


def list_text(place: str, level: str | None = None) -> str:
    """Every checkpoint of a place: step, level, state, size, age, path."""
    catalog = open_catalog(place).only(level)
    entries = catalog.entries()
    if not entries:
        return f"no checkpoints in {catalog.describe()}"
    table = _table(("step", "right"), ("level", "left"), ("state", "left"), ("size", "right"), ("age", "right"), ("path", "left"))
    for entry in entries:
        age = "" if entry.saved is None else _age(time.time() - entry.saved)
        table.add_row(f"{entry.step:,}", entry.level, entry.state, _size(entry.size), age, entry.files.name)
    notes = [f"{entry.reason}\n" for entry in entries if entry.reason]
    return _render(table) + "".join(notes)


def inspect_text(place: str, step: int | None = None, level: str | None = None) -> str:
    """The tree and the records of one checkpoint."""
    entry, record = open_catalog(place).only(level).choose(step)
    shardings, total = _shardings(entry.files), 0
    table = _table(("path", "left"), ("type and shape", "left"), ("bytes", "right"), ("sharding when saved", "left"))
    for name, leaf in record.leaves.items():
        size = _bytes(leaf)
        total += size or 0
        table.add_row(name, leaf.describe(), "" if size is None else f"{size:,}", shardings.get(name, ""))
    heads = [
        f"step {entry.step:,}, {entry.level}: {entry.files.name}",
        f"{len(record.leaves):,} arrays, {total:,} bytes; {entry.size:,} bytes of files",
    ]
    words = [f"{title}  {json.dumps(content, ensure_ascii=False)}" for title, content in _records(record)]
    return "\n".join(heads) + "\n" + _render(table) + "\n".join(words)


def diff_text(first: str, second: str) -> tuple[str, bool]:
    """(how two checkpoints differ, whether they do)."""
    one, two = open_one(first), open_one(second)
    found, equal = differences(one, two)
    heads = [f"first   step {one[0].step:,}  {one[0].files.name}", f"second  step {two[0].step:,}  {two[0].files.name}"]
    if not found:
        return "\n".join([*heads, f"equal: {equal:,} arrays to the bit, and the records"]), False
    table = _table(("path", "left"), ("difference", "left"))
    for row in found[:_SHOWN]:
        table.add_row(row.name, row.what)
    more = [f"... and {len(found) - _SHOWN:,} more"] if len(found) > _SHOWN else []
    return "\n".join(
        [*heads, _render(table).rstrip("\n"), *more, f"{equal:,} arrays are equal, {len(found):,} entries differ"]
    ), True


def verify_text(place: str, level: str | None = None) -> tuple[str, bool]:
    """(what reading everything again shows, whether all of it is whole)."""
    catalog: Catalog = open_catalog(place).only(level)
    found = verify(catalog)
    if not found:
        return f"nothing to verify: no committed checkpoints in {catalog.describe()}", False
    table = _table(("step", "right"), ("level", "left"), ("result", "left"), ("size", "right"), ("path", "left"))
    for entry, result, _ in found:
        table.add_row(f"{entry.step:,}", entry.level, result, _size(entry.size), entry.files.name)
    problems = [problem for _, _, problem in found if problem]
    return _render(table) + "\n".join([*problems, _verdict(found)]), not problems


def _verdict(found: list[tuple[Entry, str, str]]) -> str:
    whole, damaged, unreadable = ([e for e, result, _ in found if result == word] for word in ("whole", "damaged", "unreadable"))
    if not damaged and not unreadable:
        return f"whole: {len(whole)} checkpoints, every array and record read again"
    told = [f"{word}: {len(them)} of {len(found)}" for word, them in (("damaged", damaged), ("unreadable", unreadable)) if them]
    if unreadable:
        what = "a resume ends with exit code 2 until the newest one can be read"
    else:
        what = f"a resume takes step {whole[0].step:,}" if whole else "nothing is left to resume from"
    return f"{', '.join(told)} checkpoints; {what}"


def _records(record: Record) -> list[tuple[str, dict]]:
    return [("meta", record.meta), ("data", record.data)]


def _bytes(leaf: Leaf) -> int | None:
    """Of the values; not known of keys, whose size is their implementation's business."""
    return None if leaf.key_impl is not None else math.prod(leaf.shape) * _dtype(leaf.dtype).itemsize


def _dtype(name: str) -> np.dtype:
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, name, name))


def _shardings(files: StepFiles) -> dict[str, str]:
    """path -> how the array lay on the mesh when it was saved, as Orbax notes it."""
    try:
        noted = json.loads(files.read("state/_sharding"))
        found = {}
        for name, text in noted.items():
            entry = json.loads(text)
            mesh = dict(zip(entry.get("axis_names", ()), entry.get("shape", ()), strict=True))
            found[base64.b64decode(name).decode()] = _spec(entry.get("partition_spec", ()), mesh)
        return found
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _spec(dims: list, mesh: dict[str, int]) -> str:
    """Such as "fsdp=4, -": the mesh axes that split each dim, or "whole"."""
    words = []
    for dim in dims:
        axes = [axis for axis in ([dim] if isinstance(dim, str) else dim or []) if mesh.get(axis, 1) > 1]
        words.append("*".join(f"{axis}={mesh[axis]}" for axis in axes) or "-")
    return ", ".join(words) if any(word != "-" for word in words) else "whole"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:,.3g} TB"


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def _table(*columns: tuple[str, str]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title, side in columns:
        table.add_column(title, justify="right" if side == "right" else "left", overflow="fold")
    return table


def _render(table: Table) -> str:
    file = io.StringIO()
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _PLAIN_WIDTH
    Console(file=file, width=width, highlight=False, markup=False).print(table)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"
