"""The failures a user meets, apart from bugs, and the codes the command exits with."""

import errno
import os
import traceback

EXIT_FAILED, EXIT_USER, EXIT_LOST, EXIT_PREEMPTED = 1, 2, 70, 75


class UserError(Exception):
    """The user's input is wrong (config, file, data, directory). The command prints the message and exits with 2.

    The message names what happened, to which path and value, the rule, and what to do next.
    """


class RunFailed(Exception):
    """The run cannot go on, through no fault of the command line. The command prints the message and exits with 1."""


class PeerLost(Exception):
    """Another process of the run died or cannot be reached. The command prints the message and exits with 70."""


class Preempted(Exception):
    """The run was asked to stop and has saved its state. The command exits with 75: requeue me."""


def of_the_machine(error: Exception) -> tuple[str, int] | None:
    """(message, exit code) of a failure that a library raised and that is the machine's: no traceback would help. Else None."""
    if _raised_in(error, "xla_bridge.py"):
        asked = os.environ.get("JAX_PLATFORMS")
        reason = str(error).partition(" (set JAX_PLATFORMS")[0] or "no such backend is installed"
        where = f" with JAX_PLATFORMS={asked}" if asked else ""
        ways = "install JAX for it (pip install -e '.[gpu]' or '.[tpu]'), or set JAX_PLATFORMS=cpu, or leave JAX_PLATFORMS out"
        return f"JAX finds no device{where}: {reason}. Ways out: {ways}", EXIT_USER
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"{error.filename or 'what the command prints'} cannot be written: {error.strerror}; free space", EXIT_FAILED
    return None


def _raised_in(error: Exception, file: str) -> bool:
    """Whether a file of this name raised it. JAX has no words for a platform that is not installed: it fails an assertion."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and os.path.basename(frames[-1].filename) == file
