"""What of a run's config may change when the run is resumed: this is the one place that says so.

A run keeps its config, since another one computes another model. Some fields compute nothing, though: how long to wait
for a lost peer, where metrics go. And some choose only where and in which order the same sums are made. These may differ
from the config that the run was started with, and are no part of the hash that its checkpoints carry.

To exempt a field, name its path here, with the reason. A path stands for everything below it.
"""

from collections.abc import Callable, Mapping
from typing import Any

ROOT = "mlt.config.run.RunConfig"
"""The class whose paths these are; no other tree has exempt fields."""

FREE: Mapping[str, str] = {
    "train.start_timeout_seconds": "how long processes wait for each other",
    "train.peer_timeout_seconds": "when a silent process counts as lost",
    "train.hang_timeout_seconds": "when a step counts as hung",
    "train.check_every_steps": "steps done twice and compared",
    "log": "where metrics go and how often",
    "checkpoint": "when the state is saved and what is kept",
    "evaluation.every_steps": "when the held-out loss is measured",
    "sample": "texts drawn for the reader",
    "data.prefetch_batches": "batches prepared ahead",
}
"""Changes no number of the run."""

LAYOUT: Mapping[str, str] = {
    "mesh": "how arrays are split over devices",
    "remat": "what the backward pass computes again",
}
"""The same function, summed in another order: numbers agree to rounding, and no longer to the bit."""

JUDGED: Mapping[str, str] = {
    "data.source.stages": "the mixture from some row on",
    "data.source.parts": "sources of the mixture",
}
"""Judged by what owns it once the saved position is known: the loader refuses what would change a row already read."""

ASKED: Mapping[str, tuple[str, str]] = {
    "train.compute_dtype": ("checkpoint.change_dtype", "the type of activations and matrix products"),
}
"""Changes numbers: only where the config at hand asks for it, by the field that is named first."""


def asked(path: str, plain: Mapping[str, Any]) -> str | None:
    """Why the value at a path may change on resume although numbers change: the plain config at hand asks for it."""
    if path not in ASKED:
        return None
    field, reason = ASKED[path]
    value: Any = plain
    for name in field.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return f"{reason}; asked for by {field}" if value is True else None


def exemption(path: str) -> str | None:
    """Why the value at a path may change on resume, in words for the log; None where it may not."""
    for table, consequence in ((FREE, "changes no number"), (LAYOUT, "numbers agree to rounding"), (JUDGED, "from here on")):
        for prefix, reason in table.items():
            if path == prefix or path.startswith((f"{prefix}.", f"{prefix}[")):
                return f"{reason}; {consequence}"
    return None


def without_exempt(plain: Mapping[str, Any], join: Callable[[str, str], str], path: str = "") -> dict[str, Any]:
    """Plain data of a run's config without its exempt fields."""
    kept: dict[str, Any] = {}
    for key, value in plain.items():
        where = join(path, key)
        if exemption(where) is None:
            kept[key] = without_exempt(value, join, where) if isinstance(value, Mapping) else value
    return kept
