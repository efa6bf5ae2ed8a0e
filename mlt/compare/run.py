"""`mlt compare`: train what is not finished, one run after another, then put all of them into one table."""

import dataclasses
import gc
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from mlt.checkpoint.layout import CheckpointError, committed_steps, read_meta
from mlt.compare.numbers import Numbers, as_json, equal_flops, read_numbers
from mlt.compare.page import page
from mlt.compare.planned import Planned, planned_runs
from mlt.compare.same import check_same, notes
from mlt.compare.table import as_markdown, as_text, cells, remarks
from mlt.config.check import check_run
from mlt.config.run import RunConfig
from mlt.errors import Preempted, RunFailed, UserError
from mlt.run_paths import write_whole
from mlt.train.run_config import check_config
from mlt.train.run_directory import RunDirectory

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Options:
    """How to compare.

    Attributes:
        out: where runs of config files live, each in a folder of its name, beside the table; run directories stay where
            they are. None, with run directories alone, writes nothing.
        args, sets, seeds: as in `planned_runs`.
        anyway: compare runs that differ in what they should share.
        as_is: train nothing.
    """

    out: Path | None = None
    args: Sequence[str] = ()
    sets: Sequence[str] = ()
    seeds: Sequence[int] = ()
    anyway: bool = False
    as_is: bool = False


def compare(configs: Sequence[Path], options: Options, *, train: Callable[[RunConfig, Path], None], say: Say) -> None:
    """Train what is not finished, and print and write the table.

    Args:
        train: starts a run, or resumes what its directory holds.

    Raises:
        UserError: wrong words, a wrong config, or runs that are not comparable; before anything is trained.
        Preempted: a run was asked to stop; the same command goes on with it.
        RunFailed: runs failed; the table has the others.
    """
    runs = planned_runs(configs, options.out, options.args, options.sets, options.seeds)
    for run in runs:
        check_run(run.config)
        check_config(RunDirectory(run.paths.path), run.config)
    check_same(runs, seeds=len(options.seeds) > 1, anyway=options.anyway)
    failed = {} if options.as_is else _train_all(runs, train, say)
    found = [read_numbers(run, failed.get(run.name)) for run in runs]
    # Once more: what a run read is known only now.
    different = check_same(runs, seeds=len(options.seeds) > 1, anyway=options.anyway)
    _tell(found, different, options.out, say)
    if failed:
        raise RunFailed(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}; the table has what they logged")


def is_complete(run: Planned) -> bool:
    """Whether its last step is saved and evaluated."""
    try:
        steps = committed_steps(run.paths.checkpoints_path)
        last = run.config.train.steps
        return last in steps and not read_meta(run.paths.checkpoints_path, last).get("evaluation_due")
    except CheckpointError:
        return False


def _train_all(runs: Sequence[Planned], train: Callable[[RunConfig, Path], None], say: Say) -> dict[str, str]:
    """Why runs failed, by name; one that fails does not keep the others from being trained."""
    failed: dict[str, str] = {}
    for number, run in enumerate(runs, start=1):
        where = f"run {number} of {len(runs)}: {run.name}"
        if is_complete(run):
            say(f"{where}: complete, in {run.paths.path}")
            continue
        say(f"{where}, in {run.paths.path}")
        try:
            train(run.config, run.paths.path)
        except Preempted as error:
            raise Preempted(f"{where}: {error}. The same `mlt compare` command goes on from there") from None
        except RunFailed as error:
            failed[run.name] = str(error)
            say(f"{where} failed: {error}")
        # Its arrays, before those of the next.
        gc.collect()
    return failed


def _tell(found: Sequence[Numbers], different: Sequence[str], out: Path | None, say: Say) -> None:
    equal = equal_flops(found)
    rows = cells(found, equal)
    lines = remarks(found, equal, different, notes([numbers.planned for numbers in found]))
    say(f"\n{as_text(rows)}\n")
    for line in lines:
        say(line)
    if out is None:
        return
    title = out.resolve().name
    content = {
        "equal_flops": equal,
        "different": list(different),
        "remarks": lines,
        "runs": [as_json(numbers, equal) for numbers in found],
    }
    texts = {
        "compare.json": json.dumps(content, indent=1) + "\n",
        "compare.md": as_markdown(rows, lines),
        "compare.html": page(title, rows, lines, found),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_whole(out / name, text)
    except OSError as error:
        raise UserError(f"cannot write the comparison to {out}: {error.strerror}; free space, or give another --out") from error
    say(f"table: {out / 'compare.md'}, {out / 'compare.json'}; curves: {out / 'compare.html'}")
