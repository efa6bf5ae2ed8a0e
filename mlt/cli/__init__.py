"""The `mlt` command: thin. Each sub-command parses its words and calls one function elsewhere.

Nothing heavy is imported before it is needed: help and wrong command lines answer without JAX.
"""

import contextlib
import logging
import sys
import traceback

import click

from mlt.cli import checkpoint, plan, proofs, runs, training

COMMANDS = (
    *(training.train, training.check, plan.plan, proofs.verify, runs.generate, runs.eval_, training.compare),
    *(runs.export, runs.import_, runs.report, proofs.bench, training.launch, checkpoint.checkpoint),
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="mlt")
def cli() -> None:
    """Train long-context language models in JAX, and prove what they do.

    CONFIG is a Python file with a function `config`, a saved config.yaml, or a run directory.
    """


for command in COMMANDS:
    cli.add_command(command)


def _warn_plainly() -> None:
    """Print our warnings as the console prints its own, whatever a library does to the root logger."""
    handler, logger = logging.lastResort, logging.getLogger("mlt")
    if handler is not None:
        handler.setFormatter(logging.Formatter("warning: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False


def main() -> None:
    """Run the command; turn known failures into one message and an exit code."""
    from mlt import errors

    _warn_plainly()
    codes = {
        errors.UserError: errors.EXIT_USER,
        errors.RunFailed: errors.EXIT_FAILED,
        errors.PeerLost: errors.EXIT_LOST,
        errors.Preempted: errors.EXIT_PREEMPTED,
    }
    try:
        cli(standalone_mode=True)
    except tuple(codes) as error:
        message, code = str(error), next(code for kind, code in codes.items() if isinstance(error, kind))
    except Exception as error:
        message, code = errors.of_the_machine(error) or (None, errors.EXIT_FAILED)
        if message is None:
            traceback.print_exc()
    with contextlib.suppress(OSError):  # the terminal may be gone; the exit code is what a launcher reads
        if message is not None:
            click.echo(f"mlt: {message}", err=True)
    distributed = sys.modules.get("mlt.train.distributed")
    (sys.exit if distributed is None else distributed.leave)(code)
