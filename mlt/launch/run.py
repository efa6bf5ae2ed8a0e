"""What `mlt launch` does: check everything that can be checked here, then print the job or start it."""

from collections.abc import Callable
from pathlib import Path, PurePosixPath

from mlt.config.check import check_run
from mlt.config.dump import to_yaml
from mlt.config.problems import ConfigError, check_tree
from mlt.config.run import RunConfig
from mlt.launch.files import check_run_dir
from mlt.launch.spec import Job, LaunchSpec, check_devices, load_site


def launch(
    config: RunConfig, source: Path, site: Path, run_dir: Path | None, *, dry_run: bool, say: Callable[[str], None]
) -> int:
    """Start a run at a site, or resume what its directory holds; the exit code of the command.

    Args:
        config: what to train, its rules not checked yet.
        source: the CONFIG it was loaded from; names the run where `run_dir` is None.
        site: TOML file of a launcher.
        run_dir: directory of the run; None takes the one that `source` lies in, or one below the site's `runs`.
        dry_run: print the exact job instead, and write nothing.
        say: prints a text.

    Raises:
        UserError: config, site or directory is wrong, or the scheduler refuses; nothing has been started then.
    """
    spec = load_site(site)
    _check(config, spec)
    check_devices(spec, config.mesh.shape(), site)
    job = Job(_run_dir(spec, source, run_dir), to_yaml(config), PurePosixPath(Path.cwd()))
    if spec.shares_files:
        check_run_dir(job)
    if dry_run:
        say(spec.describe(job).rstrip("\n"))
        return 0
    return spec.submit(job, say)


def _check(config: RunConfig, spec: LaunchSpec) -> None:
    """Rules of the config; where its files are not meant to be here, those that need none of them."""
    if not spec.shares_files:
        check_tree(config)
        try:
            config.data.check_files()
        except ConfigError:
            return
    check_run(config)


def _run_dir(spec: LaunchSpec, source: Path, given: Path | None) -> PurePosixPath:
    if given is not None:
        return PurePosixPath(given.absolute() if spec.shares_files else given)
    folder = source if source.is_dir() else source.parent
    if spec.shares_files and (source.is_dir() or source.name == "config.yaml") and (folder / "checkpoints").is_dir():
        return PurePosixPath(folder.absolute())
    return spec.run_dir(folder.name if source.is_dir() or source.name == "config.yaml" else source.stem)
