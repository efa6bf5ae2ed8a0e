"""What two runs must share to be compared: data, tokenizer, batches, steps, seed and the held-out rows."""

from collections.abc import Sequence

from mlt.compare.planned import Planned
from mlt.config.dump import diff
from mlt.config.exempt import exemption
from mlt.errors import UserError
from mlt.report.history import read_history

SHARED = ("data", "train.steps", "train.seed", "evaluation.max_rows")
"""Sections and fields that must be the same."""

NO_MATTER = ("data.prefetch_batches", "data.cache", "data.max_bad_records")
"""Of these, what does not change what is read."""

OWN = ("model",)
"""What runs are compared for: it is in the table, and no note."""

LAYOUT = ("mesh", "remat")
"""Changes the speed alone."""


def differences(runs: Sequence[Planned], *, seeds: bool = False) -> list[str]:
    """What the runs do not share with the first one, a line each: `run: path: first -> this`.

    Args:
        seeds: the comparison has a row for several seeds, so `train.seed` may differ.
    """
    shared = tuple(path for path in SHARED if not (seeds and path == "train.seed"))
    return [line for run, path, line in _differing(runs) if _is_under(path, shared)]


def notes(runs: Sequence[Planned]) -> list[str]:
    """What else differs besides the model: optimizers, types, meshes. No reason to refuse, but to know."""
    return list(dict.fromkeys(line for _, path, line in _differing(runs) if not _is_under(path, (*SHARED, *OWN))))


def check_same(runs: Sequence[Planned], *, seeds: bool, anyway: bool) -> list[str]:
    """The lines in which runs differ that were to be the same.

    Raises:
        UserError: there are such lines, and `anyway` is False.
    """
    lines = [*differences(runs, seeds=seeds), *_corpora(runs)]
    if lines and not anyway:
        shown = "\n".join(f"  {line}" for line in lines[:20])
        more = f"\n  ... and {len(lines) - 20} more" if len(lines) > 20 else ""
        raise UserError(
            f"these runs are not comparable with {runs[0].name} (first -> this):\n{shown}{more}\nLosses of other text, batches "
            "or steps say nothing about the models. Give all runs the same (--set, --arg), or compare them as they are with "
            "--anyway"
        )
    return lines


def _differing(runs: Sequence[Planned]) -> list[tuple[Planned, str, str]]:
    first, found = runs[0], []
    for run in runs[1:]:
        for line in diff(first.config, run.config):
            path = line.partition(": ")[0]
            if _matters(path):
                found.append((run, path, f"{run.name}: {line}"))
    return found


def _matters(path: str) -> bool:
    # Of the data, a resumed run may change more than another run of a comparison.
    return not _is_under(path, NO_MATTER) if _is_under(path, SHARED) else exemption(path) is None or _is_under(path, LAYOUT)


def _corpora(runs: Sequence[Planned]) -> list[str]:
    """Runs that read other text than the first, by the hash of the corpus that their starts noted."""
    read = {run.name: read_history(run.paths.metrics_path).fact("corpus") for run in runs}
    known = {name: digest for name, digest in read.items() if digest is not None}
    first = next(iter(known), None)
    return [
        f"{name}: the documents it read: {known[first]} of {first} -> {digest}"
        for name, digest in known.items()
        if first is not None and digest != known[first]
    ]


def _is_under(path: str, prefixes: Sequence[str]) -> bool:
    return any(path == prefix or path.startswith((f"{prefix}.", f"{prefix}[")) for prefix in prefixes)
