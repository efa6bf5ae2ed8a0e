"""Eight simulated devices compute what one does: loss, metrics, gradients and one update of the quickstart's model.

`MLT_FULL=1` tries more layouts.
"""

import os

import jax
import numpy as np
import pytest

from mlt.config.load import load_config
from mlt.nn.param import named_leaves, partition
from mlt.parallel.mesh import Layout
from mlt.train.setup import build_optimizer, describe_model
from mlt.train.state import create_state
from mlt.verify.material import packed_rows
from mlt.verify.mesh import MeshStep, compare

CONFIG = "configs/quickstart.py"
SMALL = {"width": "64", "sequence_length": "64", "batch_size": "8"}
LAYOUTS = {
    "all": {"fsdp": 2, "context": 2, "expert": 2, "carry": "ring", "attention": "zigzag"},
}
MORE = {
    "tensor": {"replica": 2, "fsdp": 2, "tensor": 2, "zero": 2},
    "context": {"context": 8, "carry": "permute"},
    "data": {"replica": 2, "fsdp": 4, "zero": 1},
    "fsdp_tensor": {"fsdp": 4, "tensor": 2},
    "expert": {"fsdp": 2, "expert": 4},
    "context_tensor": {"context": 4, "tensor": 2, "attention": "ring"},
}
if os.environ.get("MLT_FULL"):
    LAYOUTS |= MORE


@pytest.fixture(scope="module")
def config(request):
    return load_config(request.config.rootpath / CONFIG, args=[f"{k}={v}" for k, v in SMALL.items()])


@pytest.fixture(scope="module")
def batch(config):
    rows, length = config.data.batch_size, config.data.sequence_length
    return packed_rows(np.random.default_rng(0), rows=rows, length=length, num_ids=259)


@pytest.fixture(scope="module")
def single(config, batch):
    return MeshStep(config, Layout(), batch, quick=True)


def assert_equal_steps(single: MeshStep, other: MeshStep) -> None:
    for name, (error, bound) in compare(single, other).items():
        assert error <= bound, f"{name}: {error:.1e}, bound {bound:.1e}"
    expected, found = single()[0], other()[0]
    for key in expected:
        assert found[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-7), key


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_one_device(config, batch, single, name):
    other = MeshStep(config, Layout(**LAYOUTS[name]), batch, quick=True)
    for (key, found), (_, value) in zip(named_leaves(other.state.model), named_leaves(single.state.model), strict=True):
        np.testing.assert_array_equal(found, value, err_msg=f"{key} starts elsewhere")
    assert_equal_steps(single, other)


def test_micro_batches_equal_one_batch(config, batch, single):
    micro = config.replace(train=config.train.replace(grad_accumulation=4))
    other = MeshStep(micro, Layout(), batch, quick=True)
    assert_equal_steps(single, other)


@pytest.mark.parametrize(("zero", "parameters", "slots"), [(3, 3, 3), (2, 1.2, 3), (1, 1.2, 3)])
def test_what_fsdp_splits(config, zero, parameters, slots):
    """Whole values over values held by one device are at least so many."""
    rules = Layout(fsdp=4, tensor=2, zero=zero).rules()
    specs = describe_model(config)
    state = create_state(specs, build_optimizer(config, specs), rules, seed=0)

    def shrinking(tree) -> float:
        leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim]
        return sum(leaf.nbytes for leaf in leaves) / sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)

    assert shrinking(partition(state.model)[0]) > parameters
    assert shrinking(state.optimizer) > slots
