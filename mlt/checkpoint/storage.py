"""What the storage library (Orbax on TensorStore) prints and leaves behind, kept off the terminal."""

import errno
import logging
import os
import re

_OS_ERROR = re.compile(r"\[os_error_code='(\d+)'\]")
_PASSING = {getattr(errno, name) for name in ("EACCES", "EPERM", "EAGAIN", "EMFILE", "ENFILE", "ENOMEM", "ESTALE", "ETIMEDOUT")}
_PASSING_STATUS = ("ABORTED", "CANCELLED", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE")
_FILE = re.compile(r'"(/[^"]*)"')


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
    """Give what a storage error began with in one line: the system's words and the file, where it has them."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    text = str(error) or type(error).__name__
    for tail in (" [tensorstore_spec", ". See full TensorStore details", "\n"):
        text = text.split(tail, 1)[0]
    number, files = _OS_ERROR.search(text), _FILE.findall(text)
    if number is None:
        return text
    return os.strerror(int(number[1])) + (f": {files[-1]}" if files else "")


def is_passing(error: BaseException) -> bool:
    """Whether a read failed for something that is not the files' fault: no rights, no network, too many open files."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error)
    number = _OS_ERROR.search(text)
    code = error.errno if isinstance(error, OSError) else int(number[1]) if number else None
    return code in _PASSING or text.startswith(_PASSING_STATUS)
