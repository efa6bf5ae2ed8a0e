"""Complete runs, without training."""

import pytest
from saved_runs import save_run

from mlt.config.run import RunConfig, TrainConfig
from mlt.model.remat import Remat


@pytest.fixture(scope="session")
def saved_run():
    """(directory, model, data, seed) -> the directory: a complete run of its drawn parameters."""

    def save(directory, model, data, seed):
        train = TrainConfig(steps=2, compute_dtype="float32")
        return save_run(directory, RunConfig(model=model, data=data, train=train, remat=Remat(mode="none")), step=2, seed=seed)

    return save
