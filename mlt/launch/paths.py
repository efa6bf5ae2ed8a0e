"""What a launcher leaves in a run directory: everything below logs/launch."""

from pathlib import Path, PurePath

from mlt.run_paths import RunPaths


class LaunchPaths:
    """Where a launcher keeps what. Creates nothing.

    config.yaml   what was launched             code-<hash>/   the code that every restart runs
    job.sh        the SLURM script              compiled/      programs that JAX compiled
    *.log         of the job and its processes  losses.json    lost processes since the newest checkpoint
    """

    def __init__(self, run_dir: PurePath) -> None:
        self.run = RunPaths(str(run_dir))
        self.path = self.run.logs_path / "launch"
        self.config_path = self.path / "config.yaml"
        self.script_path = self.path / "job.sh"
        self.compiled_path = self.path / "compiled"
        self.losses_path = self.path / "losses.json"

    def code_path(self, digest: str) -> Path:
        return self.path / f"code-{digest}"

    def process_log_path(self, index: int) -> Path:
        """Everything that process `index` prints, over all restarts."""
        return self.path / f"process-{index}.log"
