"""Arguments and options that several commands share, and the config that they name."""

from pathlib import Path

import click

config_argument = click.argument("config", type=click.Path(path_type=Path))
SEED = click.IntRange(0, 2**32 - 1)
run_argument = click.argument("run_dir", metavar="RUN_DIR", type=click.Path(path_type=Path, exists=True, file_okay=False))


def config_options(command):
    """--arg and --set, for every command that takes a CONFIG."""
    words = "Argument of the config function, name=value; may repeat."
    leaf = "Replace one leaf of the config; may repeat."
    command = click.option("--set", "sets", multiple=True, metavar="A.B=VALUE", help=leaf)(command)
    return click.option("--arg", "args", multiple=True, metavar="NAME=VALUE", help=words)(command)


def process_options(command):
    """What tells the processes of a run apart, for every command that trains."""
    where = "Address of process 0, the same for all; or MLT_COORDINATOR, or found inside srun."
    command = click.option("--process-id", type=int, help="Which process this is, from 0; or MLT_PROCESS_ID.")(command)
    command = click.option("--num-processes", type=int, help="How many there are; or MLT_NUM_PROCESSES.")(command)
    return click.option("--coordinator", metavar="HOST:PORT", help=where)(command)


def loaded_config(path: Path, args: tuple[str, ...], sets: tuple[str, ...]):
    """The config, its rules not checked yet: `check_run` reports them together with those between sections."""
    from mlt.config.load import load_config
    from mlt.config.run import RunConfig

    return load_config(path, args=args, sets=sets, root=RunConfig, check=False)
