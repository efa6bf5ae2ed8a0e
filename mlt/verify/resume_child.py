"""`mlt` in a process of its own that also notes which batches the training reads: a digest of every row, by position.

    python -m mlt.verify.resume_child NOTES train CONFIG --run-dir DIR

NOTES is a directory; each process adds a file to it. What trains is the command itself: this only stands between the
loop and its loader, and looks at what passes.
"""

import json
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

import mlt.data.loader
from mlt.data.digest import row_digests

Seen = dict[tuple[int, int], str]
"""(position of the batch in tokens, place of the row in it) -> digest of the row."""


class _Noting:
    """A loader whose batches are noted before they are handed on; everything else is the loader's own."""

    def __init__(self, loader: Any, places: Sequence[int] | None, file: IO[str]) -> None:
        self._loader, self._places, self._file = loader, places, file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __iter__(self) -> "_Noting":
        return self

    def __next__(self) -> Mapping[str, np.ndarray]:
        tokens = self._loader.state()["tokens"]
        batch = next(self._loader)
        digests = [f"{int(digest):016x}" for digest in row_digests(batch)]
        places = range(len(digests)) if self._places is None else self._places
        self._file.write(json.dumps({"tokens": tokens, "rows": dict(zip(map(str, places), digests, strict=True))}) + "\n")
        self._file.flush()
        return batch


def batches_seen(notes: Path) -> Seen:
    """What all processes noted in a directory; a line that a kill cut off is left out.

    Raises:
        ValueError: the same row of the same batch was read twice, and not alike.
    """
    found: Seen = {}
    for path in sorted(notes.glob("*.jsonl")):
        for line in path.read_text().splitlines(keepends=True):
            if not line.endswith("\n"):
                continue
            note = json.loads(line)
            for place, digest in note["rows"].items():
                key = (note["tokens"], int(place))
                if found.setdefault(key, digest) != digest:
                    raise ValueError(
                        f"row {place} of the batch at token {key[0]} was read twice, as {found[key]} and as {digest}"
                    )
    return found


def main() -> None:
    notes = Path(sys.argv.pop(1))
    notes.mkdir(parents=True, exist_ok=True)
    file = (notes / f"{os.getpid()}.jsonl").open("w")
    open_loader = mlt.data.loader.open_loader

    def noting(*args: Any, **options: Any) -> Any:
        return _Noting(open_loader(*args, **options), options.get("places"), file)

    mlt.data.loader.open_loader = noting
    runpy.run_module("mlt.cli", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
