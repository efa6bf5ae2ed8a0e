"""The failures a user meets, apart from bugs."""


class UserError(Exception):
    """The user's input is wrong (config, file, data, directory). The command prints the message and exits with 2.

    The message names what happened, to which path and value, the rule, and what to do next.
    """


class RunFailed(Exception):
    """The run cannot go on, through no fault of the command line. The command prints the message and exits with 1."""


class Preempted(Exception):
    """The run was asked to stop and has saved its state. The command exits with 75: requeue me."""
