"""MLP Memory's start: the first layers of another run, frozen to the bit, and feed-forward layers of its own behind them."""

import jax
import numpy as np
import pytest

from mlt.config.check import check_run
from mlt.config.problems import ConfigError
from mlt.config.run import RunConfig, TrainConfig
from mlt.data.loader import DataConfig
from mlt.data.synthetic import SyntheticText
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.attention import Attention
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack
from mlt.nn.param import named_leaves, partition
from mlt.parallel.mesh import Layout
from mlt.train.distill import Distill
from mlt.train.load import load_model
from mlt.train.setup import prepare

PERIOD = (Block(mixers=(Attention(num_heads=2, head_dim=8), SwiGLU(d_ff=16))),)
BASE = LMConfig(d_model=16, vocab_size=272, stack=Stack(period=PERIOD, repeats=3))
MEMORY = BASE.replace(stack=Stack(period=PERIOD, repeats=2, upper=(Block(mixers=(SwiGLU(d_ff=24),)),), upper_repeats=2))
DATA = DataConfig(
    source=SyntheticText(num_documents=20, mean_words=20), sequence_length=32, batch_size=2, validation_fraction=0.2
)
TRAINED = ("stack.upper.*", "norm.*", "head")


def test_a_memory_starts_from_the_first_layers_and_trains_what_is_its_own(tmp_path, saved_run):
    base = saved_run(tmp_path / "base", BASE, DATA, 5)

    def run(layers):
        distill = Distill(teacher=str(base), match="logits", weight=0.0, layers=layers, trained=TRAINED)
        return RunConfig(model=MEMORY, data=DATA, train=TrainConfig(steps=2, compute_dtype="float32", distill=distill))

    config = run((0, 1, -1, -1))
    check_run(config)
    model = prepare(config, Layout().rules(jax.devices()[:1])).fresh_state().model
    theirs, trained = dict(named_leaves(load_model(base)[1])), {name for name, _ in named_leaves(partition(model)[0])}
    for name, array in named_leaves(model):
        own = name.startswith("stack.upper.")
        assert (name in trained) == (own or name.startswith("norm.") or name == "head"), name
        if not own:
            np.testing.assert_array_equal(array, theirs[name][:2] if name.startswith("stack.") else theirs[name])
    for layers, text in (((0, 1, -1), "this model has 4 layers"), ((0, 3, -1, -1), "it has 3"), ((0, -1, -1, -1), "one array")):
        with pytest.raises(ConfigError, match=text):
            check_run(run(layers))
