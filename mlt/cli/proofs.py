"""What is shown of a model, a layout, a resumed run, or of an op on this device."""

import sys
from pathlib import Path

import click
from click.core import ParameterSource

from mlt.cli.options import SEED, config_argument, config_options, loaded_config

_OF_RESUME = ("steps", "kills", "processes", "out")


@click.command()
@config_argument
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the random weights and documents.")
@click.option("--mesh", metavar="AXIS=N,...", help="Compare this layout with one device instead, e.g. context=4,fsdp=2.")
@click.option("--resume", is_flag=True, help="Make the resume certificate instead: kill runs, resume them, compare.")
@click.option("--steps", default=12, show_default=True, help="--resume: of each run.")
@click.option("--kills", default=10, show_default=True, help="--resume: in all.")
@click.option("--processes", default=2, show_default=True, help="--resume: the other number of processes; 1 tries none.")
@click.option("--out", type=click.Path(path_type=Path), help="--resume: where the certificate goes; a run's own directory.")
@config_options
def verify(
    config: Path,
    seed: int,
    mesh: str | None,
    resume: bool,
    steps: int,
    kills: int,
    processes: int,
    out: Path | None,
    args: tuple[str, ...],
    sets: tuple[str, ...],
) -> None:
    """Prove isolation, causality, decoding and finite gradients of a config's model, or that a layout computes the same.

    --resume proves that a run that is killed and resumed ends as one that never was, and (--mesh) goes on on other devices.
    """
    _refuse_idle_options(resume)
    loaded = loaded_config(config, args, sets)
    from mlt.verify.run import Options, certify, parse_layout, verify, verify_mesh

    layout = None if mesh is None else parse_layout(mesh, loaded.mesh)
    if resume:
        options = Options(steps=steps, kills=kills, layout=layout, processes=processes, name=str(config))
        passed = certify(loaded, options, config, out, say=click.echo)
    elif layout is None:
        passed = verify(loaded, seed=seed, say=click.echo)
    else:
        passed = verify_mesh(loaded, layout, seed=seed, say=click.echo)
    if not passed:
        sys.exit(1)


def _refuse_idle_options(resume: bool) -> None:
    """An option that this call would not look at is a mistake: the caller expects something of it."""
    context = click.get_current_context()
    given = [name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    for name in given:
        if name in _OF_RESUME and not resume:
            raise click.UsageError(f"--{name} is for the resume certificate; add --resume, or leave --{name} out")
        if name == "seed" and resume:
            raise click.UsageError("--seed is for random weights, and --resume trains by the config's; use --set train.seed=N")


@click.command()
@click.argument("op", required=False)
@click.option("--backend", "backends", multiple=True, help="Time this backend only; may repeat.")
@click.option("--suite", help="Shapes: cpu, small, std or long; by default those of the device at hand.")
def bench(op: str | None, backends: tuple[str, ...], suite: str | None) -> None:
    """Time ops on this device: error, forward, forward+backward, floor, peers that import."""
    from mlt.bench.run import bench

    if not bench(op, backends=backends, suite=suite, say=click.echo):
        sys.exit(1)
