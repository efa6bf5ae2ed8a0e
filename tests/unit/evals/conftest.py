"""Run directories with a checkpoint, without training."""

import jax
import pytest

from mlt.checkpoint.save import Checkpointer
from mlt.config.dump import to_yaml
from mlt.config.run import RunConfig, TrainConfig
from mlt.model.remat import Remat
from mlt.parallel.mesh import Layout
from mlt.run_paths import RunPaths
from mlt.train.setup import build_optimizer, describe_model
from mlt.train.state import create_state


@pytest.fixture(scope="session")
def saved_run():
    """(directory, model, data, seed) -> the directory: a complete run of its drawn parameters."""

    def save(directory, model, data, seed):
        config = RunConfig(model=model, data=data, train=TrainConfig(steps=2, compute_dtype="float32"), remat=Remat(mode="none"))
        paths, specs = RunPaths(directory), describe_model(config)
        state = create_state(specs, build_optimizer(config, specs), Layout().rules(jax.devices()[:1]), seed=seed)
        paths.path.mkdir()
        paths.config_path.write_text(to_yaml(config))
        with Checkpointer(paths.checkpoints_path) as checkpointer:
            checkpointer.save(2, state, data={}, meta={"tokens": 1})
        return directory

    return save
