"""Eight simulated devices compute what one does: loss, gradients and one update of the quickstart's model."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from mlt.config.load import load_config
from mlt.nn.param import named_leaves, partition
from mlt.parallel.mesh import Layout
from mlt.train.setup import build_optimizer, describe_model, step_options
from mlt.train.state import abstract_state, create_state
from mlt.train.step import train_step
from mlt.verify.material import packed_rows

CONFIG = "configs/quickstart.py"
SMALL = {"width": "64", "sequence_length": "64", "batch_size": "8"}
LAYOUTS = {
    "data": {"replica": 8},
    "fsdp_tensor": {"fsdp": 4, "tensor": 2},
    "tensor": {"replica": 2, "fsdp": 2, "tensor": 2},
    "expert": {"fsdp": 2, "expert": 4},
    "context": {"context": 8, "carry": "permute"},
    "all": {"fsdp": 2, "context": 2, "expert": 2, "carry": "ring", "attention": "zigzag"},
}


@pytest.fixture(scope="module")
def config(request):
    path = request.config.rootpath / CONFIG
    # SGD-like size of the update: with Adam a gradient of rounding size would still move its parameter by a full step.
    return load_config(path, args=[f"{k}={v}" for k, v in SMALL.items()], sets=["optimizer.eps=1e-3"])


class Step:
    """One compiled train step on a layout, from the same start on the same batch."""

    def __init__(self, config, layout: Layout, devices: int, grad_accumulation: int = 1):
        rules = layout.rules(jax.devices()[:devices])
        specs = describe_model(config)
        optimizer = build_optimizer(config, specs)
        options = step_options(config.replace(train=config.train.replace(grad_accumulation=grad_accumulation)), rules)
        self.state = create_state(specs, optimizer, rules, seed=0)
        rows, length = config.data.batch_size, config.data.sequence_length
        batch = packed_rows(np.random.default_rng(0), rows=rows, length=length, num_ids=259)
        self.batch = jax.device_put(batch, rules.sharding(("batch", "seq")))
        # Not donated: the same start is used again.
        places = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(specs, optimizer, rules))
        step = functools.partial(train_step, optimizer=optimizer, options=options)
        step = jax.jit(step, out_shardings=(places, None))
        with jax.default_matmul_precision("highest"):
            self.compiled = step.lower(self.state, self.batch).compile()

    def __call__(self, state=None):
        """(metrics, new state)."""
        new, metrics = self.compiled(self.state if state is None else state, self.batch)
        return {name: float(value) for name, value in metrics.items()}, new


def gradients(state) -> dict[str, np.ndarray]:
    """After one step Adam's first moment is the clipped gradient times 1 - beta1."""
    leaves = {name: np.asarray(leaf) for name, leaf in named_leaves(state.optimizer)}
    return {name: leaf for name, leaf in leaves.items() if "mu" in name.split(".")}


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float(np.linalg.norm(found.astype(np.float64) - expected) / (np.linalg.norm(expected) + 1e-12))


@pytest.fixture(scope="module")
def single(config):
    """(step, metrics, new state, rounding): `rounding` is how far each gradient moves when every parameter moves by half
    a unit in its last place. No float32 program can be expected to be nearer to another than some multiple of that."""
    step = Step(config, Layout(), 1)
    metrics, new = step()
    rng = np.random.default_rng(1)
    shaken = jax.tree.map(lambda p: p * (1 + np.float32(2.0**-24) * rng.choice([-2, 2], p.shape)), step.state.model)
    _, other = step(dataclasses.replace(step.state, model=jax.tree.map(cast_like, shaken, step.state.model)))
    expected, moved = gradients(new), gradients(other)
    return step, metrics, new, {name: distance(moved[name], value) for name, value in expected.items()}


def cast_like(value, like):
    return jax.device_put(np.asarray(value).astype(like.dtype), like.sharding)


def assert_equal_steps(found, single):
    metrics, new = found
    _, expected_metrics, expected, rounding = single
    for key, value in expected_metrics.items():
        assert metrics[key] == pytest.approx(value, rel=1e-5, abs=1e-7), key
    grads = gradients(new)
    for key, value in gradients(expected).items():
        error = distance(grads[key], value)
        assert error <= max(1e-5, 10 * rounding[key]), f"gradient of {key}: {error:.1e}, rounding alone {rounding[key]:.1e}"


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_one_device(config, single, name):
    step = Step(config, Layout(**LAYOUTS[name]), 8)
    for (key, found), (_, value) in zip(named_leaves(step.state.model), named_leaves(single[0].state.model), strict=True):
        np.testing.assert_array_equal(found, value, err_msg=f"{key} starts elsewhere")
    assert_equal_steps(step(), single)


def test_micro_batches_equal_one_batch(config, single):
    metrics, new = Step(config, Layout(), 1, grad_accumulation=4)()
    # The imbalance of experts is a mean over micro-batches by definition.
    metrics["aux/max_violation"] = single[1]["aux/max_violation"]
    assert_equal_steps((metrics, new), single)


def test_parameters_are_sharded_not_copied(config):
    rules = Layout(fsdp=4, tensor=2).rules()
    specs = describe_model(config)
    state = create_state(specs, build_optimizer(config, specs), rules, seed=0)
    trained, _ = partition(state.model)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(trained))
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(trained))
    assert held < total / 3
