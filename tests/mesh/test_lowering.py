"""The train step lowers for CUDA and TPU on an abstract mesh of 64 devices, without any of them."""

import pathlib

import pytest
from mlt_kernels import dispatch

from mlt.config.load import load_config
from mlt.parallel.mesh import Layout
from mlt.train.setup import build_optimizer, describe_model, step_options
from mlt.train.state import abstract_batch, abstract_state
from mlt.train.step import jit_train_step

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").glob("*.py"))
LAYOUT = Layout(replica=2, fsdp=2, context=4, tensor=2, expert=2)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("path", CONFIGS)
def test_lowers_on_64_devices(path, platform):
    config = load_config(ROOT / path)
    rules = LAYOUT.abstract_rules()
    specs = describe_model(config)
    optimizer = build_optimizer(config, specs)
    state = abstract_state(specs, optimizer, rules)
    options = step_options(config, rules, specs)
    batch = abstract_batch(rules, LAYOUT.batch_shards, 256)
    step = jit_train_step(state, optimizer, options)
    with dispatch.target_platform("gpu" if platform == "cuda" else "tpu"):
        lowered = step.trace(state, batch).lower(lowering_platforms=(platform,))
    text = lowered.as_text()
    assert "num_partitions = 64" in text
    assert "custom_call @Sharding" in text or "sdy.sharding" in text
