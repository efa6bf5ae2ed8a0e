"""Metrics to Weights & Biases, on request: offline by default, one run across restarts."""

import os
import secrets
from collections.abc import Mapping
from typing import Any, Literal, cast

import yaml

from mlt.config.base import Config
from mlt.run_paths import RunPaths, write_whole

_INIT_TIMEOUT_SECONDS = 30


class WandbConfig(Config):
    """A project on Weights & Biases.

    Attributes:
        project: its name.
        name: of the run; None takes the run directory's name.
        mode: "offline" writes files below <run>/wandb that `wandb sync` uploads; "online" needs an account. The
            environment variable WANDB_MODE has precedence.
    """

    project: str
    name: str | None = None
    mode: Literal["offline", "online"] = "offline"


class WandbSink:
    """A wandb run that a resumed training goes on with: its id is kept in <run>/wandb/run_id.

    The step is an ordinary metric and the x axis of all others: wandb drops rows whose own step counter goes back, as
    it does after a resume from an earlier checkpoint.
    """

    def __init__(self, config: WandbConfig, paths: RunPaths) -> None:
        """Open the run.

        Raises:
          Exception: wandb is not installed, has no account to go online with, or cannot be reached in time.
        """
        import wandb

        id_path = paths.path / "wandb" / "run_id"
        if not id_path.exists():
            id_path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(id_path, secrets.token_hex(4))
        self.run_id = id_path.read_text().strip()
        self._run = wandb.init(
            project=config.project,
            name=config.name or paths.path.absolute().name,
            id=self.run_id,
            resume="allow",
            mode=cast(Any, os.environ.get("WANDB_MODE") or config.mode),
            dir=str(paths.path),
            settings=wandb.Settings(
                silent=True, console="off", save_code=False, disable_git=True, init_timeout=_INIT_TIMEOUT_SECONDS
            ),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if paths.config_path.exists():
            self._run.config.update(yaml.safe_load(paths.config_path.read_text()), allow_val_change=True)

    def start(self, step: int, facts: Mapping[str, Any]) -> None:
        self._run.config.update({"start": dict(facts)}, allow_val_change=True)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def rewind(self, step: int, facts: Mapping[str, Any]) -> None:
        """Nothing is taken back here; the step is an ordinary metric, so later rows may be of earlier steps."""

    def close(self) -> None:
        self._run.finish()
