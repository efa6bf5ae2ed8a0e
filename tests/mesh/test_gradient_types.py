"""Gradients of the head, of experts and of convolutions are summed over devices in float32, whatever the stream's type."""

import collections
import re

import pytest

from mlt.config.load import load_config
from mlt.parallel.mesh import Layout
from mlt.train.setup import build_optimizer, describe_model, step_options
from mlt.train.state import abstract_batch, abstract_state
from mlt.train.step import jit_train_step

SUM = re.compile(r'"stablehlo\.(all_reduce|reduce_scatter)".*?\) -> tensor<([^>]*)>', re.DOTALL)


@pytest.mark.parametrize(("zero", "kind"), [(3, "reduce_scatter"), (1, "all_reduce")])
def test_parameters_that_ops_need_whole_are_summed_in_float32(zero, kind):
    config = load_config("tests/faults/tiny.py")
    config = config.replace(train=config.train.replace(compute_dtype="bfloat16"), data=config.data.replace(batch_size=8))
    rules, specs = Layout(replica=2, fsdp=2, expert=2, zero=zero).rules(), describe_model(config)
    optimizer = build_optimizer(config, specs)
    abstract = abstract_state(specs, optimizer, rules)
    batch = abstract_batch(rules, 8, config.data.sequence_length)
    text = jit_train_step(abstract, optimizer, step_options(config, rules, specs)).lower(abstract, batch).as_text()
    found = collections.defaultdict(set)
    for name, shape in SUM.findall(text):
        found[shape.rpartition("x")[2]].add((name, shape.rpartition("x")[0]))
    share = 2 if zero == 3 else 1
    # The head (32, 272) and, of two of four experts, gate and up (32, 16) and down (16, 32); kernels of convolutions (4, 32).
    split = (f"{32 // share}x272", f"2x{32 // share}x16", f"2x16x{32 // share}")
    for name, dims in (*((kind, dims) for dims in split), ("all_reduce", "4x32")):
        assert (name, dims) in found["f32"]
        assert not any(dims == other for _, other in found["bf16"])
