"""The run report: one HTML file that stands alone, made of what the run directory holds."""

from pathlib import Path

import yaml

from mlt.errors import UserError
from mlt.report.curves import curves, more_metrics
from mlt.report.head import header
from mlt.report.history import History, read_account, read_history
from mlt.report.sections import checkpoints, collisions, origin, samples, sources, time_spent
from mlt.report.standalone import standalone
from mlt.run_paths import RunPaths, write_whole


def write_report(run_dir: str | Path) -> Path:
    """Write <run_dir>/report.html from the config, metrics, samples, plan and checkpoints found there.

    Any of them may be missing or cut off by a crash; the report says what it found.

    Returns:
      The path of the page.

    Raises:
      UserError: `run_dir` is no directory with a run, or the page cannot be written.
    """
    paths = RunPaths(run_dir)
    if not (paths.config_path.exists() or paths.metrics_path.exists()):
        raise UserError(f"{paths.path} holds no run: neither {paths.config_path.name} nor {paths.metrics_path.name} is there")
    try:
        write_whole(paths.report_path, _page(paths))
    except OSError as error:
        raise UserError(
            f"cannot write {paths.report_path}: {error.strerror}; free space, change the rights, or copy the run elsewhere"
        ) from error
    return paths.report_path


def _page(paths: RunPaths) -> str:
    history = read_history(paths.metrics_path)
    config = _read(paths.config_path)
    name, account = paths.path.absolute().name, read_account(paths.logs_path / "goodput.jsonl")
    body = "\n".join(
        [
            header(name, paths, history, _total_steps(history, config), account),
            curves(history),
            time_spent(account),
            more_metrics(history),
            samples(paths),
            collisions(paths),
            checkpoints(paths),
            origin(history),
            sources(_read(paths.plan_path), config),
        ]
    )
    return standalone(f"{name}: run report", body, f"mlt report {paths.path}")


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None


def _total_steps(history: History, config: str | None) -> int | None:
    """Steps the run is to do: as its last start said, else as its config says."""
    total = history.fact("steps")
    if total is None and config:
        try:
            total = yaml.safe_load(config)["train"]["steps"]
        except (yaml.YAMLError, KeyError, TypeError):
            return None
    return total if isinstance(total, int) and total > 0 else None
