"""The model of a run, for everything that reads a checkpoint and trains nothing."""

from pathlib import Path

import jax
from jax.sharding import SingleDeviceSharding

from mlt.checkpoint.restore import restore
from mlt.config.load import load_config
from mlt.config.run import RunConfig
from mlt.model.lm import LM
from mlt.run_paths import RunPaths
from mlt.train.setup import describe_model


def load_model(run_dir: Path, step: int | None = None) -> tuple[RunConfig, LM, int]:
    """(config, model of arrays on one device, step) of a run's checkpoint; the newest by default.

    Raises:
        UserError: the directory holds no run, or no such checkpoint.
    """
    paths = RunPaths(run_dir)
    config = load_config(paths.config_path, root=RunConfig)
    where = SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda spec: spec.abstract(where), describe_model(config))
    restored = restore(paths.checkpoints_path, target, step=step, subtree="model")
    return config, restored.state, restored.step
