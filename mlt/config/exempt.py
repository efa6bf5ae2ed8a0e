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

MODEL = "model.stack"
"""Where its layers stand."""

FREE: Mapping[str, str] = {
    "train.start_timeout_seconds": "how long processes wait for each other",
    "train.peer_timeout_seconds": "when a silent process counts as lost",
    "train.hang_timeout_seconds": "when a step counts as hung",
    "train.check_memory": "whether a state that cannot fit is refused",
    "train.check_every_steps": "steps done twice and compared",
    "log": "where metrics go and how often",
    "checkpoint": "when the state is saved and what is kept",
    "evaluation.every_steps": "when the held-out loss is measured",
    "evaluation.generic": "a second score of what is held out",
    "sample": "texts drawn for the reader",
    "data.prefetch_batches": "batches prepared ahead",
}
"""Changes no number of the run."""

LAYOUT: Mapping[str, str] = {
    "mesh": "how arrays are split over devices",
    "remat": "what the backward pass computes again",
}
"""The same function, summed in another order: numbers agree to rounding, and no longer to the bit."""

LAYERS: Mapping[str, str] = {
    "hash_on": "where rows of a table are computed, the same ones",
    "table_on": "where a table lies; its checkpoint is the same",
}
"""Fields of layers, wherever in the model they stand: the same numbers, and over several devices sums of another order."""

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
    field = path.rpartition(".")[2]
    if path.startswith(f"{MODEL}.") and field in LAYERS:
        return f"{LAYERS[field]}; numbers agree to rounding"
    return None


def without_exempt(plain: Any, join: Callable[[str, str | int], str], path: str = "") -> Any:
    """Plain data of a run's config without its exempt fields."""
    if isinstance(plain, Mapping):
        places = {key: join(path, key) for key in plain}
        return {key: without_exempt(value, join, places[key]) for key, value in plain.items() if exemption(places[key]) is None}
    if isinstance(plain, list):
        return [without_exempt(item, join, join(path, index)) for index, item in enumerate(plain)]
    return plain
