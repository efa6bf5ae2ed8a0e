"""What the maps are made of: links that undo themselves, layers folded into stacks, stretched rotary frequencies."""

import numpy as np
import pytest

from mlt.export.huggingface.architecture import stack_of
from mlt.export.huggingface.links import Link, Part, depthwise_conv, fused_linear
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.rope_scaling import LinearRope
from mlt.mixers.sequence.short_conv import ShortConv
from mlt.model.block import Block
from mlt.nn.rope import apply_rope

A, B, C = (Block(mixers=(SwiGLU(d_ff=n),)) for n in (8, 16, 24))
D = Block(mixers=(ShortConv(),))


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ([A], (0, 1, 1, 0)),
        ([A] * 5, (0, 1, 5, 0)),
        ([A, B] * 3, (0, 2, 3, 0)),
        ([C, A, B, A, B], (1, 2, 2, 0)),
        ([A, B, A, B, A], (0, 2, 2, 1)),
        ([D, A, A, A, B, A, A, A, B, C], (1, 4, 2, 1)),
        ([A, B, C, D], (0, 4, 1, 0)),
    ],
)
def test_stack_of(layers, shape):
    stack = stack_of(layers)
    assert stack.layers() == layers
    assert (len(stack.head), len(stack.period), stack.repeats, len(stack.tail)) == shape


def test_fused_rows_go_where_they_belong():
    link = fused_linear("w", 3, (("first", 2), ("second", 4)))
    weight = np.arange(18.0).reshape(6, 3)
    ours = dict(link.read({"w": weight}, {"first": (3, 2), "second": (3, 2, 2)}))
    np.testing.assert_array_equal(ours["first"], weight[:2].T)
    np.testing.assert_array_equal(ours["second"], weight[2:].T.reshape(3, 2, 2))
    np.testing.assert_array_equal(dict(link.write(ours))["w"], weight)


def test_convolution_taps_lie_first():
    link = depthwise_conv("w", 3, (("conv", 4),))
    weight = np.arange(12.0).reshape(4, 1, 3)
    ours = dict(link.read({"w": weight}, {"conv": (3, 2, 2)}))
    np.testing.assert_array_equal(ours["conv"][2], weight[:, 0, 2].reshape(2, 2))
    np.testing.assert_array_equal(dict(link.write(ours))["w"], weight)


def test_interleaved_stacked_and_split_parts():
    """Two tensors, each of two heads of (1 plain row, 2 pairs of neighbours), from which halves are made."""
    pairs = Part("pairs", 4, (0, 4, 1, 3, 2), (2, 2, 2, 2, 3))
    link = Link(("a", "b"), (10, 3), (Part("plain", 1), pairs), (2, 2, 5, 3), axis=2)
    theirs = {"a": np.arange(30.0).reshape(10, 3), "b": -np.arange(30.0).reshape(10, 3)}
    ours = dict(link.read(theirs, {"plain": (2, 2, 3), "pairs": (2, 3, 2, 4)}))
    np.testing.assert_array_equal(ours["plain"][0], theirs["a"][[0, 5]])
    np.testing.assert_array_equal(ours["pairs"][1, 2, 1], theirs["b"][[6, 8, 7, 9], 2])
    back = dict(link.write(ours))
    for name, array in theirs.items():
        np.testing.assert_array_equal(back[name], array)


def test_linear_scaling_divides_positions():
    """No model of the goldens has it: positions 0, 4, 8 under factor 4 turn as 0, 1, 2 do."""
    x = np.random.default_rng(0).standard_normal((1, 3, 2, 8), np.float32)
    near = apply_rope(x, np.array([[0, 1, 2]]), base=100.0)
    far = apply_rope(x, np.array([[0, 4, 8]]), base=100.0, frequency=LinearRope(factor=4.0).frequencies(100.0, 8))
    np.testing.assert_allclose(far, near, rtol=0, atol=1e-6)
