"""What the storage library (Orbax on TensorStore) prints and leaves behind, kept off the terminal."""

import logging
import sys
from collections.abc import Callable
from typing import Any


class _NotOrbax(logging.Filter):
    """Drops the records of the storage library: progress notes, and failures that are raised anyway."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "/orbax/" not in record.pathname.replace("\\", "/")


def silence_orbax() -> None:
    """Filter the shared absl logger; calling it again changes nothing."""
    logger = logging.getLogger("absl")
    if not any(isinstance(entry, _NotOrbax) for entry in logger.filters):
        logger.addFilter(_NotOrbax())


def reason_of(error: BaseException) -> str:
    """Give the first line of what a storage error began with, without the dump of its specification."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error) or type(error).__name__
    for tail in (" [tensorstore_spec", ". See full TensorStore details", "\n"):
        text = text.split(tail, 1)[0]
    return text


def ignore_abandoned_reads() -> None:
    """Keep Python from reporting the reads that a failed restore leaves unfinished, one traceback for each.

    They end in other threads at some later time, so the report is filtered from now on, and only theirs.
    """
    if not isinstance(sys.unraisablehook, _NotAbandoned):
        sys.unraisablehook = _NotAbandoned(sys.unraisablehook)


class _NotAbandoned:
    """Passes on every unraisable exception but those of reads that lost their event loop."""

    def __init__(self, report: Callable[[Any], object]) -> None:
        self._report = report

    def __call__(self, unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        of_storage = code is not None and "/orbax/" in code.co_filename.replace("\\", "/")
        lost_loop = unraisable.object is None and str(unraisable.exc_value) == "Event loop is closed"
        if not (of_storage or lost_loop):
            self._report(unraisable)
