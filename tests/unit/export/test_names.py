"""Exported tensors are named by layer and come back bit for bit."""

import jax
import numpy as np

from mlt.export.names import from_tensors, to_tensors
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.short_conv import ShortConv
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack
from mlt.nn.param import initialize

A, B = Block(mixers=(ShortConv(),)), Block(mixers=(SwiGLU(d_ff=8), ShortConv()))
CONFIG = LMConfig(d_model=8, vocab_size=16, stack=Stack(head=(A,), period=(B, A), repeats=2, tail=(B,)))


def test_round_trip():
    specs = CONFIG.build()
    model = initialize(specs, 0)
    tensors = to_tensors(CONFIG, model)
    layers = {name.split(".")[1] for name in tensors if name.startswith("layers.")}
    assert layers == {"0", "1", "2", "3", "4", "5"}
    assert tensors["layers.3.sub_layers.0.mixer.up.kernel"].shape == (8, 8)
    again = from_tensors(CONFIG, specs, tensors)
    assert jax.tree.structure(again) == jax.tree.structure(model)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(a, b)
