"""What starts runs: here, several to compare, or elsewhere; and what is said of a config before."""

import os
import sys
from pathlib import Path

import click

from mlt.cli.options import config_argument, config_options, loaded_config, process_options


@click.command()
@config_argument
@click.option("--params", is_flag=True, help="Also print every parameter: shape, axes, init, group.")
@config_options
def check(config: Path, params: bool, args: tuple[str, ...], sets: tuple[str, ...]) -> None:
    """Report every problem of a config at once, or print the plan."""
    loaded = loaded_config(config, args, sets)
    from mlt.plan.check import check_text

    click.echo(check_text(loaded, params=params))


@click.command()
@config_argument
@click.option(
    "--run-dir", required=True, type=click.Path(path_type=Path), help="Where the run lives; an existing run is resumed."
)
@process_options
@config_options
def train(
    config: Path,
    run_dir: Path,
    args: tuple[str, ...],
    sets: tuple[str, ...],
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
) -> None:
    """Start a run, or resume what the run directory holds.

    On several machines, start the same command on each of them: see docs/distributed.md.
    """
    from mlt.train.processes import find_processes

    processes = find_processes(os.environ, coordinator=coordinator, num_processes=num_processes, process_id=process_id)
    loaded = loaded_config(config, args, sets)
    from mlt.train.loop import train

    train(loaded, run_dir, processes)


@click.command()
@click.argument("configs", nargs=-1, required=True, metavar="CONFIG...", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Where the runs and the table go; the same folder goes on.")
@click.option("--arg", "args", multiple=True, metavar="NAME=V1,V2", help="Argument of config functions; each value is a run.")
@click.option("--set", "sets", multiple=True, metavar="A.B=VALUE", help="Replace one leaf of every config; may repeat.")
@click.option("--seeds", metavar="S1,S2", default="", help="Train every config with each of these seeds.")
@click.option("--anyway", is_flag=True, help="Compare runs of other data, tokenizer, batch or steps; the table says which.")
@click.option("--as-is", is_flag=True, help="Train nothing: only put what the runs have logged into the table.")
def compare(
    configs: tuple[Path, ...],
    out: Path | None,
    args: tuple[str, ...],
    sets: tuple[str, ...],
    seeds: str,
    anyway: bool,
    as_is: bool,
) -> None:
    """Train several configs, or several values of an argument, on the same data, and compare them in one table.

    A CONFIG may be a run directory: it is resumed where it is not finished, and read where it is.
    """
    from mlt.errors import UserError

    try:
        numbers = tuple(int(seed) for seed in seeds.split(",") if seed.strip())
    except ValueError:
        raise UserError(f"--seeds {seeds}: must be numbers between commas, such as 0,1,2") from None
    from mlt.compare.run import Options, compare
    from mlt.train.loop import train

    compare(configs, Options(out, args, sets, numbers, anyway, as_is), train=train, say=click.echo)


@click.command()
@config_argument
@click.option("--on", "site", required=True, type=click.Path(path_type=Path), help="TOML file of the site: launch/*.toml.")
@click.option("--run-dir", type=click.Path(path_type=Path), help="Where the run lives; by default below the site's `runs`.")
@click.option("--dry-run", is_flag=True, help="Print the exact job, and write nothing.")
@config_options
def launch(config: Path, site: Path, run_dir: Path | None, dry_run: bool, args: tuple[str, ...], sets: tuple[str, ...]) -> None:
    """Start or resume a run elsewhere: in processes of this machine, on SLURM or on Kubernetes."""
    loaded = loaded_config(config, args, sets)
    from mlt.launch.run import launch

    if code := launch(loaded, config, site, run_dir, dry_run=dry_run, say=click.echo):
        sys.exit(code)
