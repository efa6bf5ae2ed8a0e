"""Run directories with a checkpoint, without training."""

import pathlib

import jax

from mlt.checkpoint.save import Checkpointer
from mlt.config.dump import to_yaml
from mlt.config.run import RunConfig
from mlt.parallel.mesh import Layout
from mlt.run_paths import RunPaths
from mlt.train.setup import build_optimizer, describe_model
from mlt.train.state import create_state


def save_run(directory: pathlib.Path, config: RunConfig, *, step: int, seed: int) -> pathlib.Path:
    """The directory of a run whose step has the parameters that a seed draws."""
    paths, specs = RunPaths(directory), describe_model(config)
    state = create_state(specs, build_optimizer(config, specs), Layout().rules(jax.devices()[:1]), seed=seed)
    paths.path.mkdir(exist_ok=True)
    paths.config_path.write_text(to_yaml(config))
    with Checkpointer(paths.checkpoints_path) as checkpointer:
        checkpointer.save(step, state, data={}, meta={"tokens": 1})
    return directory
