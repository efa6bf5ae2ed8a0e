"""Norms of the residual stream against their formulas."""

import numpy as np
import pytest

from mlt.mixers.channel.swiglu import SwiGLU
from mlt.model.block import Block
from mlt.nn.norm import stream_norm
from mlt.nn.param import initialize, named_leaves
from mlt.verify.material import lively


@pytest.mark.parametrize(("kind", "offset"), [("rms", False), ("rms", True), ("layer", False)])
def test_a_norm_of_the_stream(kind, offset):
    norm = lively(initialize(stream_norm(kind, 8, eps=1e-3, unit_offset=offset), 0), 1, std=0.3)
    x = np.random.default_rng(2).standard_normal((3, 8)) + 1.0
    w = {name: np.asarray(leaf, np.float64) for name, leaf in named_leaves(norm)}
    centred = x - x.mean(-1, keepdims=True) if kind == "layer" else x
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-3) * (w["scale"] + offset) + w.get("bias", 0.0)
    np.testing.assert_allclose(norm(x.astype(np.float32)), expected, rtol=0, atol=1e-5)


def test_an_offset_belongs_to_the_rms_norm():
    block = Block(mixers=(SwiGLU(d_ff=8),), norm="layer", unit_offset_norm=True)
    assert [problem.path for problem in block.problems()] == ["unit_offset_norm"]
