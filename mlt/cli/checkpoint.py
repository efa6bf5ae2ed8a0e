"""`mlt checkpoint`: looks at checkpoints as files."""

import os
import sys

import click


@click.group()
def checkpoint() -> None:
    """Look at checkpoints: no accelerator, no model.

    PLACE is a run directory, a directory of checkpoints, or a durable place (path or URL).
    """
    # Set before JAX is imported: these commands read files, and must not take a device from a run.
    os.environ["JAX_PLATFORMS"] = "cpu"


level_option = click.option("--level", type=click.Choice(["local", "durable"]), help="Only the checkpoints of this level.")


@checkpoint.command("list")
@click.argument("place")
@level_option
def list_(place: str, level: str | None) -> None:
    """Every checkpoint: step, level, state, size, age."""
    from mlt.checkpoint.show import list_text

    click.echo(list_text(place, level))


@checkpoint.command()
@click.argument("place")
@click.option("--step", type=int, help="The newest by default.")
@level_option
def inspect(place: str, step: int | None, level: str | None) -> None:
    """The tree of one checkpoint: path, shape, type, bytes, sharding; and what the run recorded with it."""
    from mlt.checkpoint.show import inspect_text

    click.echo(inspect_text(place, step, level))


@checkpoint.command()
@click.argument("first")
@click.argument("second")
def diff(first: str, second: str) -> None:
    """Compare two checkpoints leaf by leaf; exit code 1 where they differ.

    Each is a step directory, or a PLACE with @STEP behind it (the newest step without).
    """
    from mlt.checkpoint.show import diff_text

    text, different = diff_text(first, second)
    click.echo(text)
    sys.exit(int(different))


@checkpoint.command("verify")
@click.argument("place")
@level_option
def verify_(place: str, level: str | None) -> None:
    """Read every array and record of every committed checkpoint again; exit code 1 where one is not whole, or there is none."""
    from mlt.checkpoint.show import verify_text

    text, whole = verify_text(place, level)
    click.echo(text)
    sys.exit(int(not whole))
