"""The `mlt` command: thin. Each sub-command parses its words and calls one function elsewhere.

Nothing heavy is imported before it is needed: help and wrong command lines answer without JAX.
"""

import sys
from pathlib import Path

import click

EXIT_USER, EXIT_PREEMPTED = 2, 75

config_argument = click.argument("config", type=click.Path(path_type=Path))
run_argument = click.argument("run_dir", metavar="RUN_DIR", type=click.Path(path_type=Path, exists=True, file_okay=False))


def config_options(command):
    """--arg and --set, for every command that takes a CONFIG."""
    words = "Argument of the config function, name=value; may repeat."
    leaf = "Replace one leaf of the config; may repeat."
    command = click.option("--set", "sets", multiple=True, metavar="A.B=VALUE", help=leaf)(command)
    return click.option("--arg", "args", multiple=True, metavar="NAME=VALUE", help=words)(command)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="mlt")
def cli() -> None:
    """Train long-context language models in JAX, and prove what they do.

    CONFIG is a Python file with a function `config`, a saved config.yaml, or a run directory.
    """


@cli.command()
@config_argument
@click.option(
    "--run-dir", required=True, type=click.Path(path_type=Path), help="Where the run lives; an existing run is resumed."
)
@config_options
def train(config: Path, run_dir: Path, args: tuple[str, ...], sets: tuple[str, ...]) -> None:
    """Start a run, or resume what the run directory holds."""
    loaded = _load(config, args, sets)
    from mlt.train.loop import train

    train(loaded, run_dir)


@cli.command()
@config_argument
@click.option("--params", is_flag=True, help="Also print every parameter: shape, axes, init, group.")
@config_options
def check(config: Path, params: bool, args: tuple[str, ...], sets: tuple[str, ...]) -> None:
    """Report every problem of a config at once, or print the plan."""
    loaded = _load(config, args, sets)
    from mlt.plan.check import check_text

    click.echo(check_text(loaded, params=params))


@cli.command()
@config_argument
@click.option("--seed", default=0, show_default=True, help="Of the random weights and documents.")
@config_options
def verify(config: Path, seed: int, args: tuple[str, ...], sets: tuple[str, ...]) -> None:
    """Prove isolation, causality, decoding and finite gradients of a config's model."""
    loaded = _load(config, args, sets)
    from mlt.verify.run import verify

    if not verify(loaded, seed=seed, say=click.echo):
        sys.exit(1)


@cli.command()
@run_argument
@click.option("--prompt", default="", help="Text to continue.")
@click.option("--tokens", default=256, show_default=True, help="Tokens to draw.")
@click.option("--temperature", default=0.8, show_default=True, help="0 takes the most likely token.")
@click.option("--seed", default=0, show_default=True)
@click.option("--step", type=int, help="Checkpoint to use; the newest by default.")
def generate(run_dir: Path, prompt: str, tokens: int, temperature: float, seed: int, step: int | None) -> None:
    """Continue a prompt with a run's newest checkpoint."""
    from mlt.evals.sample import sample_run

    click.echo(sample_run(run_dir, prompt, tokens=tokens, temperature=temperature, seed=seed, step=step))


@cli.command()
@run_argument
@click.option("--to", "target", required=True, type=click.Path(path_type=Path), help="Directory to write.")
@click.option("--step", type=int, help="Checkpoint to use; the newest by default.")
def export(run_dir: Path, target: Path, step: int | None) -> None:
    """Write weights (safetensors), config, tokenizer and parameter table."""
    from mlt.export.safetensors import export_run

    click.echo(export_run(run_dir, target, step=step))


@cli.command()
@run_argument
def report(run_dir: Path) -> None:
    """Write the run's report.html."""
    from mlt.report.page import write_report

    click.echo(write_report(run_dir))


def _load(path: Path, args: tuple[str, ...], sets: tuple[str, ...]):
    """The config, its rules not checked yet: `check_run` reports them together with those between sections."""
    from mlt.config.load import load_config
    from mlt.config.run import RunConfig

    return load_config(path, args=args, sets=sets, root=RunConfig, check=False)


def main() -> None:
    """Run the command; turn known failures into one message and an exit code."""
    from mlt.errors import Preempted, RunFailed, UserError

    try:
        cli(standalone_mode=True)
    except UserError as error:
        click.echo(f"mlt: {error}", err=True)
        sys.exit(EXIT_USER)
    except RunFailed as error:
        click.echo(f"mlt: {error}", err=True)
        sys.exit(1)
    except Preempted as stop:
        click.echo(f"mlt: {stop}", err=True)
        sys.exit(EXIT_PREEMPTED)


if __name__ == "__main__":
    main()
