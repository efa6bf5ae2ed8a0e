"""What is made of a run directory, or into one: text, scores, weights, a report."""

from pathlib import Path

import click

from mlt.cli.options import SEED, run_argument


@click.command()
@run_argument
@click.option("--prompt", default="", help="Text to continue.")
@click.option("--tokens", default=256, show_default=True, help="Tokens to draw.")
@click.option("--temperature", default=0.8, show_default=True, help="0 takes the most likely token.")
@click.option("--seed", type=SEED, default=0, show_default=True)
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


@click.command("eval")
@run_argument
@click.option("--suite", default="recall", show_default=True, help="What to ask: recall or held-out.")
@click.option("--rows", default=200, show_default=True, help="Rows of each setting.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the rows.")
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


@click.command()
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


@click.command("import")
@click.argument("source", metavar="HF_DIR", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--run-dir", required=True, type=click.Path(path_type=Path), help="New directory of the run.")
@click.option("--set", "sets", multiple=True, metavar="A.B=VALUE", help="Replace one leaf of the run's config; may repeat.")
def import_(source: Path, run_dir: Path, sets: tuple[str, ...]) -> None:
    """Make a run of a model directory of transformers: config.json, safetensors and tokenizer.json."""
    from mlt.export.huggingface.imports import import_run

    click.echo(import_run(source, run_dir, sets=sets))


@click.command()
@run_argument
def report(run_dir: Path) -> None:
    """Write the run's report.html."""
    from mlt.report.page import write_report

    click.echo(write_report(run_dir))
