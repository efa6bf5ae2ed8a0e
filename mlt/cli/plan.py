"""What a run would take of devices that need not be there."""

import os
import sys
from pathlib import Path

import click

from mlt.cli.options import config_argument, config_options, loaded_config


@click.command()
@config_argument
@click.option("--devices", required=True, metavar="COUNTxKIND", help="Such as 64xH200, 8xH100 or 256xv5p.")
@click.option("--layouts", type=click.IntRange(min=1), help="List so many layouts, those that fit and are fastest first.")
@click.option("--compile", "compiled", is_flag=True, help="Also compile it, with JAX's CUDA plugin; needs no GPU.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@config_options
def plan(
    config: Path,
    devices: str,
    layouts: int | None,
    compiled: bool,
    as_json: bool,
    args: tuple[str, ...],
    sets: tuple[str, ...],
) -> None:
    """Say what a config takes of devices that need not be there: memory, collectives, the least time of a step.

    Without a mesh in the config, layouts are tried and the best is shown. The exit code is 1 if nothing fits.
    """
    # Set before JAX is imported: nothing is run, and no device may be taken from a run.
    os.environ["JAX_PLATFORMS"] = "cpu"
    loaded = loaded_config(config, args, sets)
    from mlt.plan.devices_text import plan_devices

    text, fits = plan_devices(loaded, devices, layouts=layouts, as_json=as_json, compiled=compiled)
    click.echo(text, nl=False)
    if not fits:
        sys.exit(1)
