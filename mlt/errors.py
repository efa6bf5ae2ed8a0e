"""The failures a user meets, apart from bugs, and the codes the command exits with."""

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
