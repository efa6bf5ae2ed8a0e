"""The difference of two checkpoints, leaf by leaf, and the check of every array and record of one."""

import concurrent.futures
from typing import Any, NamedTuple

import numpy as np

from mlt.checkpoint.arrays import StoredArrays, altered
from mlt.checkpoint.catalog import COUNTED, Catalog, Entry
from mlt.checkpoint.digest import text_of
from mlt.checkpoint.layout import Record, StepFiles, Unreadable, read_record
from mlt.checkpoint.leaves import Leaf
from mlt.errors import UserError

_READERS = 4


class Difference(NamedTuple):
    """How one leaf, or one entry of `meta` or `data`, differs.

    Attributes:
      name: path of the leaf, or "meta: ..." and "data: ...".
      what: in words.
    """

    name: str
    what: str


def differences(first: tuple[Entry, Record], second: tuple[Entry, Record]) -> tuple[list[Difference], int]:
    """Compare two checkpoints; arrays are read only where their digests differ, in pieces.

    Returns:
      (what differs, in the order of the first; the number of leaves that are equal).

    Raises:
      CheckpointError: an array cannot be read.
    """
    (one, left), (two, right) = first, second
    stored = StoredArrays(one.files), StoredArrays(two.files)
    found, equal = [], 0
    for name in dict.fromkeys([*left.leaves, *right.leaves]):
        a, b = left.leaves.get(name), right.leaves.get(name)
        if a is None or b is None:
            found.append(Difference(name, "only in the first" if b is None else "only in the second"))
        elif a == b:
            equal += 1
        elif (a.shape, a.key_impl) != (b.shape, b.key_impl):
            found.append(Difference(name, f"{a.describe()} and {b.describe()}"))
        else:
            types = "" if a.dtype == b.dtype else f"{a.dtype} and {b.dtype}; "
            found.append(Difference(name, types + _distance(stored, name, a, b)))
    for title, x, y in (("meta", left.meta, right.meta), ("data", left.data, right.data)):
        found += [Difference(f"{title}: {path}", what) for path, what in _unlike(x, y)]
    return found, equal


def verify(catalog: Catalog) -> list[tuple[Entry, str, str]]:
    """Read everything that is committed again.

    Returns:
      (entry, "whole", "damaged" or "unreadable", what is wrong with it), for the committed and damaged ones.
    """
    checked = []
    for entry in catalog.entries():
        if entry.state in COUNTED:
            try:
                if entry.level == "durable" and catalog.durable is not None:
                    catalog.durable.check_files(entry.step)
                _verify_arrays(entry.files)
                checked.append((entry, "whole", ""))
            except UserError as error:
                checked.append((entry, "unreadable" if isinstance(error, Unreadable) else "damaged", str(error)))
    return checked


def _verify_arrays(files: StepFiles) -> None:
    leaves, stored = read_record(files).leaves, StoredArrays(files)
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        running = [pool.submit(stored.verify, name, leaf) for name, leaf in leaves.items()]
        for future in running:
            future.result()


def _distance(stored: tuple[StoredArrays, StoredArrays], name: str, a: Leaf, b: Leaf) -> str:
    """How many elements differ and by how much at most, in float64.

    Raises:
      CheckpointError: one of them cannot be read, or its bits are not those that were saved.
    """
    other = stored[1].open(name, b)
    count, largest, digests = 0, 0.0, [0, 0]
    for box, part in stored[0].pieces(name, a):
        again = stored[1].read(name, other, box)
        digests = [total + one.digest for total, one in zip(digests, (part, again), strict=True)]
        x, y = part.values, again.values
        kind = np.complex128 if np.iscomplexobj(x) else np.float64
        x, y = x.astype(kind), y.astype(kind)
        unlike = ~((x == y) | (np.isnan(x) & np.isnan(y)))
        count += int(np.count_nonzero(unlike))
        if unlike.any():
            with np.errstate(invalid="ignore"):
                largest = float(np.maximum(largest, np.max(np.abs(x[unlike] - y[unlike]))))
    for side, leaf, digest in zip(stored, (a, b), digests, strict=True):
        if text_of(digest) != leaf.digest:
            raise altered(side.files, [name])
    if count == 0:
        return "equal in value, not in bits"
    return f"{count:,} elements differ, by {largest:.3g} at most"


def _unlike(x: Any, y: Any, path: str = "") -> list[tuple[str, str]]:
    """Paths where two JSON values differ, and how."""
    if isinstance(x, dict) and isinstance(y, dict):
        found = []
        for key in dict.fromkeys([*x, *y]):
            below = f"{path}.{key}" if path else str(key)
            if key not in x or key not in y:
                found.append((below, "only in the second" if key not in x else "only in the first"))
            else:
                found += _unlike(x[key], y[key], below)
        return found
    return [] if x == y else [(path, f"{_short(x)} and {_short(y)}")]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
