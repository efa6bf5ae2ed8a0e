"""What must lie in the run directory before a job starts, and what may not."""

from mlt.config.dump import binding_changes, from_yaml
from mlt.errors import UserError
from mlt.launch.paths import LaunchPaths
from mlt.launch.snapshot import copy_code
from mlt.launch.spec import Job
from mlt.run_paths import write_whole

_SHOWN = 20  # lines of a config difference that are printed


def check_run_dir(job: Job) -> None:
    """Refuse a run directory that the job could not use: it would learn so only after its wait in the queue.

    Raises:
        UserError: the run has another config, or a process trains there now.
    """
    paths = LaunchPaths(job.run_dir).run
    if paths.path.exists() and not paths.path.is_dir():
        raise UserError(f"{paths.path} is a file; choose another --run-dir")
    if paths.in_use():
        raise UserError(
            f"run directory in use: a process trains in {paths.path}; wait for it, stop it, or choose another --run-dir"
        )
    if not paths.config_path.exists():
        return
    saved = paths.config_path.read_text()
    try:
        lines = binding_changes(from_yaml(saved, source=str(paths.config_path)), from_yaml(job.config_text))
    except UserError:
        return  # damaged: the run mends it where its checkpoints are of this config, and refuses otherwise
    if lines:
        shown = lines[:_SHOWN] + ([f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else [])
        told = "\n  ".join(shown)
        raise UserError(
            f"{paths.path} holds a run of another config:\n  {told}\n"
            "launch it as it was (give the run directory as CONFIG), or choose another --run-dir"
        )


def write_files(job: Job, digest: str, script: str | None = None) -> None:
    """Write the resolved config, the copy of the code and, for a scheduler, the script. Starts the count of losses anew.

    Raises:
        UserError: the run directory cannot be written.
    """
    paths = job.paths
    try:
        paths.path.mkdir(parents=True, exist_ok=True)
        paths.losses_path.unlink(missing_ok=True)
        write_whole(paths.config_path, job.config_text)
        if script is not None:
            write_whole(paths.script_path, script)
    except OSError as error:
        raise UserError(f"{paths.path} cannot be written: {error.strerror}; choose another --run-dir") from error
    copy_code(paths.code_path(digest))
