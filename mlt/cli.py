"""The `mlt` command: thin. Each sub-command parses its words and calls one function elsewhere.

Nothing heavy is imported before it is needed: help and wrong command lines answer without JAX.
"""

import logging
import os
import sys
import traceback
from pathlib import Path

import click

config_argument = click.argument("config", type=click.Path(path_type=Path))
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
    loaded = _load(config, args, sets)
    from mlt.train.loop import train

    train(loaded, run_dir, processes)


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
    loaded = _load(config, args, sets)
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


@cli.command()
@run_argument
@click.option("--prompt", default="", help="Text to continue.")
@click.option("--tokens", default=256, show_default=True, help="Tokens to draw.")
@click.option("--temperature", default=0.8, show_default=True, help="0 takes the most likely token.")
@click.option("--seed", default=0, show_default=True)
@click.option("--step", type=int, help="Checkpoint to use; the newest by default.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Hold the parameters in this type.")
@click.option("--memory", type=click.Path(path_type=Path), help="Run of a memory to put beside it (docs/side_memories.md).")
@click.option("--share", type=float, help="--memory: its share of the probabilities, in [0, 1].")
@click.option("--cluster", type=int, help="Leaf of the prompt's document, where the model fetches by clusters; -1 is generic.")
def generate(
    run_dir: Path,
    prompt: str,
    tokens: int,
    temperature: float,
    seed: int,
    step: int | None,
    dtype: str | None,
    memory: Path | None,
    share: float | None,
    cluster: int | None,
) -> None:
    """Continue a prompt with a run's newest checkpoint."""
    from mlt.evals.sample import sample_run

    options = {"seed": seed, "step": step, "dtype": dtype, "memory": memory, "share": share, "cluster": cluster}
    click.echo(sample_run(run_dir, prompt, tokens=tokens, temperature=temperature, **options))


@cli.command("eval")
@run_argument
@click.option("--suite", default="recall", show_default=True, help="What to ask: recall or held-out.")
@click.option("--rows", default=200, show_default=True, help="Rows of each setting.")
@click.option("--seed", default=0, show_default=True, help="Of the rows.")
@click.option("--step", type=int, help="Checkpoint to use; the newest by default.")
@click.option("--long-mamba", type=int, metavar="TOKENS", help="Extend Mamba layers that were trained on rows of so many tokens.")
@click.option("--memory", type=click.Path(path_type=Path), help="held-out: run of a memory (docs/side_memories.md).")
@click.option("--share", "shares", type=float, multiple=True, help="held-out: its share of the probabilities; may repeat.")
def eval_(
    run_dir: Path,
    suite: str,
    rows: int,
    seed: int,
    step: int | None,
    long_mamba: int | None,
    memory: Path | None,
    shares: tuple[float, ...],
) -> None:
    """Ask a run's model what it can do: the suites are in docs/recall.md, held-out loss with a memory in side_memories.md."""
    from mlt.evals.suites import evaluate_run

    options = {"long_mamba": long_mamba, "memory": memory, "shares": shares}
    evaluate_run(run_dir, suite, say=click.echo, rows=rows, seed=seed, step=step, **options)


@cli.command()
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


@cli.command()
@run_argument
@click.option("--to", "target", required=True, type=click.Path(path_type=Path), help="Directory to write.")
@click.option("--step", type=int, help="Checkpoint to use; the newest by default.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["mlt", "huggingface"]),
    default="mlt",
    show_default=True,
    help="huggingface: an architecture that transformers knows, where there is one for the model.",
)
def export(run_dir: Path, target: Path, step: int | None, form: str) -> None:
    """Write weights (safetensors), config, tokenizer and parameter table."""
    if form == "huggingface":
        from mlt.export.huggingface.exports import export_huggingface

        click.echo(export_huggingface(run_dir, target, step=step))
        return
    from mlt.export.safetensors import export_run

    click.echo(export_run(run_dir, target, step=step))


@cli.command("import")
@click.argument("source", metavar="HF_DIR", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--run-dir", required=True, type=click.Path(path_type=Path), help="New directory of the run.")
@click.option("--set", "sets", multiple=True, metavar="A.B=VALUE", help="Replace one leaf of the run's config; may repeat.")
def import_(source: Path, run_dir: Path, sets: tuple[str, ...]) -> None:
    """Make a run of a model directory of transformers: config.json, safetensors and tokenizer.json."""
    from mlt.export.huggingface.imports import import_run

    click.echo(import_run(source, run_dir, sets=sets))


@cli.command()
@run_argument
def report(run_dir: Path) -> None:
    """Write the run's report.html."""
    from mlt.report.page import write_report

    click.echo(write_report(run_dir))


@cli.command()
@click.argument("op", required=False)
@click.option("--backend", "backends", multiple=True, help="Time this backend only; may repeat.")
@click.option("--suite", help="Shapes: cpu, small, std or long; by default those of the device at hand.")
def bench(op: str | None, backends: tuple[str, ...], suite: str | None) -> None:
    """Time ops on this device: error, forward, forward+backward, floor, peers that import."""
    from mlt.bench.run import bench

    if not bench(op, backends=backends, suite=suite, say=click.echo):
        sys.exit(1)


@cli.command()
@config_argument
@click.option("--on", "site", required=True, type=click.Path(path_type=Path), help="TOML file of the site: launch/*.toml.")
@click.option("--run-dir", type=click.Path(path_type=Path), help="Where the run lives; by default below the site's `runs`.")
@click.option("--dry-run", is_flag=True, help="Print the exact job, and write nothing.")
@config_options
def launch(config: Path, site: Path, run_dir: Path | None, dry_run: bool, args: tuple[str, ...], sets: tuple[str, ...]) -> None:
    """Start or resume a run elsewhere: in processes of this machine, on SLURM or on Kubernetes."""
    loaded = _load(config, args, sets)
    from mlt.launch.run import launch

    if code := launch(loaded, config, site, run_dir, dry_run=dry_run, say=click.echo):
        sys.exit(code)


@cli.group()
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
    """Read every committed checkpoint again, to the last byte; exit code 1 where one is damaged, or there is none."""
    from mlt.checkpoint.show import verify_text

    text, whole = verify_text(place, level)
    click.echo(text)
    sys.exit(int(not whole))


def _load(path: Path, args: tuple[str, ...], sets: tuple[str, ...]):
    """The config, its rules not checked yet: `check_run` reports them together with those between sections."""
    from mlt.config.load import load_config
    from mlt.config.run import RunConfig

    return load_config(path, args=args, sets=sets, root=RunConfig, check=False)


def _warn_plainly() -> None:
    """Print our warnings as the console prints its own, whatever a library does to the root logger."""
    handler, logger = logging.lastResort, logging.getLogger("mlt")
    if handler is not None:
        handler.setFormatter(logging.Formatter("warning: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False


def main() -> None:
    """Run the command; turn known failures into one message and an exit code."""
    from mlt.errors import EXIT_FAILED, EXIT_LOST, EXIT_PREEMPTED, EXIT_USER, PeerLost, Preempted, RunFailed, UserError

    _warn_plainly()
    codes = {UserError: EXIT_USER, RunFailed: EXIT_FAILED, PeerLost: EXIT_LOST, Preempted: EXIT_PREEMPTED}
    try:
        cli(standalone_mode=True)
    except tuple(codes) as error:
        click.echo(f"mlt: {error}", err=True)
        code = next(code for kind, code in codes.items() if isinstance(error, kind))
    except Exception:
        traceback.print_exc()
        code = EXIT_FAILED
    distributed = sys.modules.get("mlt.train.distributed")
    (sys.exit if distributed is None else distributed.leave)(code)


if __name__ == "__main__":
    main()
