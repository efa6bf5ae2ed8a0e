"""Eight simulated devices compute what one does: loss, gradients and one update of the quickstart's model."""

import functools

import jax
import numpy as np
import pytest

from mlt.config.load import load_config
from mlt.nn.param import named_leaves, partition
from mlt.parallel.mesh import Layout
from mlt.parallel.rules import Rules
from mlt.train.setup import build_optimizer, describe_model, step_options
from mlt.train.state import abstract_state, create_state
from mlt.train.step import train_step
from mlt.verify.material import packed_rows

CONFIG = "configs/quickstart.py"
SMALL = {"width": "64", "sequence_length": "64", "batch_size": "8"}
LAYOUTS = {
    "data": {"replica": 8},
    "fsdp": {"fsdp": 8},
    "fsdp_tensor": {"fsdp": 4, "tensor": 2},
    "all": {"replica": 2, "fsdp": 2, "tensor": 2},
    "expert": {"fsdp": 2, "expert": 4},
}


@pytest.fixture(scope="module")
def config(request):
    path = request.config.rootpath / CONFIG
    # SGD-like size of the update: with Adam a gradient of rounding size would still move its parameter by a full step.
    return load_config(path, args=[f"{k}={v}" for k, v in SMALL.items()], sets=["optimizer.eps=1e-3"])


def run(config, layout: Layout, devices: int, grad_accumulation: int = 1):
    """One step from the same start on the same batch: (metrics, parameters before minus after)."""
    rules = Rules(layout.build(jax.devices()[:devices]))
    specs = describe_model(config)
    optimizer = build_optimizer(config, specs)
    options = step_options(config.replace(train=config.train.replace(grad_accumulation=grad_accumulation)), rules)
    state = create_state(specs, optimizer, rules, seed=0)
    batch = packed_rows(np.random.default_rng(0), rows=config.data.batch_size, length=config.data.sequence_length, num_ids=259)
    batch = jax.device_put(batch, rules.sharding(("batch", "seq")))
    before = {name: np.asarray(leaf) for name, leaf in named_leaves(state.model)}
    step = jax.jit(functools.partial(train_step, optimizer=optimizer, options=options))
    out_shardings = jax.tree.map(lambda s: s.sharding, abstract_state(specs, optimizer, rules))
    with jax.default_matmul_precision("highest"):
        new, metrics = step(state, batch)
    placed = jax.tree.map(lambda leaf, want: leaf.sharding.is_equivalent_to(want, leaf.ndim), new.model, out_shardings.model)
    after = {name: np.asarray(leaf) for name, leaf in named_leaves(new.model)}
    moments = {name: np.asarray(leaf) for name, leaf in named_leaves(new.optimizer)}
    return {k: float(v) for k, v in metrics.items()}, before, after, moments, placed


@pytest.fixture(scope="module")
def single(config):
    return run(config, Layout(), 1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_one_device(config, single, name):
    metrics, before, after, moments, placed = run(config, Layout(**LAYOUTS[name]), 8)
    for key, value in single[0].items():
        assert metrics[key] == pytest.approx(value, rel=1e-5, abs=1e-7), key
    for key, value in single[1].items():
        np.testing.assert_array_equal(before[key], value, err_msg=f"{key} starts elsewhere")
    for key, value in single[3].items():
        if "mu" in key.split("."):
            scale = np.abs(value).max() + 1e-12
            np.testing.assert_allclose(moments[key], value, rtol=0, atol=1e-5 * scale, err_msg=f"gradient of {key}")
    for key, value in single[2].items():
        moved = np.abs(value.astype(np.float64) - single[1][key]).max() + 1e-12
        np.testing.assert_allclose(after[key], value, rtol=0, atol=1e-4 * moved + 1e-7, err_msg=f"update of {key}")
    assert all(jax.tree.leaves(placed)), "a parameter left its sharding"


def test_micro_batches_equal_one_batch(config, single):
    metrics, _, after, _, _ = run(config, Layout(), 1, grad_accumulation=4)
    assert metrics["train/loss"] == pytest.approx(single[0]["train/loss"], rel=1e-5)
    assert metrics["train/grad_norm"] == pytest.approx(single[0]["train/grad_norm"], rel=1e-5)
    for key, value in single[2].items():
        moved = np.abs(value.astype(np.float64) - single[1][key]).max() + 1e-12
        np.testing.assert_allclose(after[key], value, rtol=0, atol=1e-4 * moved + 1e-7, err_msg=key)


def test_parameters_are_sharded_not_copied(config):
    rules = Rules(Layout(fsdp=4, tensor=2).build())
    specs = describe_model(config)
    state = create_state(specs, build_optimizer(config, specs), rules, seed=0)
    trained, _ = partition(state.model)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(trained))
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(trained))
    assert held < total / 3
