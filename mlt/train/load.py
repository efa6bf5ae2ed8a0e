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
from mlt.train.token_maps import check_token_maps


def load_model(run_dir: Path, step: int | None = None, *, dtype: str | None = None) -> tuple[RunConfig, LM, int]:
    """(config, model of arrays on one device, step) of a run's checkpoint; the newest by default.

    Args:
        run_dir: of the run.
        step: of the checkpoint.
        dtype: float32, bfloat16 or float16: what floating arrays are rounded to; None leaves them as they were saved.

    Raises:
        UserError: the directory holds no run, or no such checkpoint.
    """
    paths = RunPaths(run_dir)
    config = load_config(paths.config_path, root=RunConfig)
    where, specs = SingleDeviceSharding(jax.devices()[0]), describe_model(config)
    check_token_maps(paths.checkpoints_path, specs, config.data.tokenizer, step=step)
    target = jax.tree.map(lambda spec: spec.abstract(where), specs)
    dtypes = None if dtype is None else {"": dtype}
    restored = restore(paths.checkpoints_path, target, step=step, subtree="model", dtypes=dtypes)
    return config, restored.state, restored.step
