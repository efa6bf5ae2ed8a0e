"""Splits of arrays over mesh axes, through one operation."""

import pytest
from jax.sharding import PartitionSpec as P

from mlt.plan import splits

SIZES = {"replica": 1, "fsdp": 4, "expert": 1, "context": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("shape", "split", "out_shape", "expected"),
    [
        ((8, 16, 32), (("fsdp",), (), ("tensor",)), (8, 16, 4, 8), (("fsdp",), (), ("tensor",), ())),
        ((8, 16, 4, 8), (("fsdp",), (), ("tensor",), ()), (8, 16, 32), (("fsdp",), (), ("tensor",))),
        ((8, 16, 32), (("fsdp",), ("context",), ()), (128, 32), (("fsdp", "context"), ())),
        ((8, 1, 32), (("fsdp",), (), ("tensor",)), (8, 32), (("fsdp",), ("tensor",))),
        ((6, 32), ((), ("tensor",)), (6, 1, 32, 1), ((), (), ("tensor",), ())),
        ((64,), (("fsdp",),), (2, 32), ((), ("fsdp",))),
        ((), (), (1, 1), ((), ())),
    ],
)
def test_reshaping_keeps_what_its_dims_allow(shape, split, out_shape, expected):
    assert splits.reshaped(split, shape, out_shape, SIZES) == expected


def test_a_product_that_sums_over_a_split_dim_is_a_sum_of_parts():
    x, w = (("fsdp",), ("context",), ("tensor",)), (("tensor",), ())
    out, summed, gathered = splits.product(x, w, (((2,), (0,)), ((), ())), (1000, 10))
    assert (out, summed, gathered) == ((("fsdp",), ("context",), ()), {"tensor"}, (set(), set()))


def test_the_smaller_operand_is_gathered_where_both_are_split_by_an_axis():
    x, w = (("fsdp",), ("context",), ()), (("fsdp",), ("tensor",))
    out, summed, gathered = splits.product(x, w, (((2,), (0,)), ((), ())), (1000, 10))
    assert (out, summed, gathered) == ((("fsdp",), ("context",), ("tensor",)), set(), (set(), {"fsdp"}))


def test_a_weights_gradient_sums_over_the_batch_and_the_sequence():
    x, dy = (("fsdp",), ("context",), ()), (("fsdp",), ("context",), ("tensor",))
    out, summed, gathered = splits.product(x, dy, (((0, 1), (0, 1)), ((), ())), (1000, 1000))
    assert (out, summed, gathered) == (((), ("tensor",)), {"fsdp", "context"}, (set(), set()))


def test_what_a_device_holds():
    split = splits.from_spec(P(("replica", "fsdp"), None, "tensor"), 3)
    assert splits.effective(split, SIZES) == (("fsdp",), (), ("tensor",))
    assert splits.local_shape((8, 5, 7), split, SIZES) == (2, 5, 4)  # uneven parts are padded
