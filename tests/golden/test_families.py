"""Every model family: its configs are right, its counts are what the docs say; of some, the step can be traced.

    MLT_FULL=1 python -m pytest tests/golden/test_families.py

also traces and trains every small model for three steps and runs `mlt verify` on it: some twenty minutes on two cores.
"""

import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tool_files import tool

from mlt.config.check import check_run
from mlt.config.dump import from_yaml, to_yaml
from mlt.config.load import load_config
from mlt.config.problems import ConfigError, walk
from mlt.errors import UserError
from mlt.mixers.channel.moe import MoE
from mlt.mixers.sequence.differential_attention import DifferentialAttention
from mlt.mixers.sequence.differential_cross_attention import DifferentialCrossAttention
from mlt.model.count import count
from mlt.model.edges import PARTS
from mlt.nn.param import named_leaves
from mlt.parallel.mesh import Layout
from mlt.train.setup import build_optimizer, describe_model, step_options
from mlt.train.state import abstract_batch, abstract_state, create_state
from mlt.train.step import train_step
from mlt.verify.material import packed_rows
from mlt.verify.run import verify

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "families"
FULL = bool(os.environ.get("MLT_FULL"))
TRACED = ("composite", "deepseek_v3", "jamba", "kimi_linear", "mem_mamba", "move", "sambay", "ultramem_v2", "xlstm", "zamba2")
TRAINED = ("resformer", "yoco")
ROWS, LENGTH = 2, 64


table = tool("family_table")
FAMILIES = table.families()
CASES = [(name, size) for name, module in FAMILIES.items() for size in module.SIZES]
PUBLISHED = [case for case in CASES if FAMILIES[case[0]].SIZES[case[1]].published is not None]


@pytest.mark.parametrize(("name", "size"), CASES)
def test_every_size_is_a_config_without_problems(name, size):
    config = load_config(FOLDER / f"{name}.py", args=[f"size={size}"])
    check_run(config)
    assert from_yaml(to_yaml(config)) == config


def test_an_unknown_size_names_those_there_are():
    with pytest.raises(UserError, match=r"small, 0\.6b, 8b"):
        load_config(FOLDER / "qwen3.py", args=["size=7b"])


@pytest.mark.parametrize("size", ["small", "8b"])
@pytest.mark.parametrize("argument", ["steps", "sequence_length", "batch_size"])
def test_a_zero_is_refused_and_not_taken_for_nothing_given(argument, size):
    with pytest.raises(ConfigError, match=rf"{argument} = 0: must be at least 1"):
        check_run(load_config(FOLDER / "qwen3.py", args=[f"size={size}", f"{argument}=0"], check=False))


@pytest.mark.parametrize(("name", "size"), PUBLISHED)
def test_counts_are_the_published_ones_or_say_why_not(name, size):
    chosen = FAMILIES[name].SIZES[size]
    params = count(chosen.model, chosen.model.build(table.TOKENS), 4096).params
    assert table.agrees(params, chosen.published) or chosen.note


RELEASED = {
    ("transformer", "8b"): 8_030_261_248,
    ("transformer", "1b"): 1_235_814_400,
    ("qwen3", "0.6b"): 596_049_920,
    ("qwen3", "8b"): 8_190_735_360,
    ("mamba", "130m"): 129_135_360,
    ("mamba", "370m"): 371_516_416,
    ("mamba", "790m"): 793_204_224,
    ("mamba", "1.4b"): 1_372_178_432,
    ("mamba", "2.8b"): 2_768_345_600,
    ("xlstm", "1.4b"): 1_420_839_104,
    ("xlstm", "7b"): 6_865_424_896,
    ("mixtral", "8x7b"): 46_702_792_704,
    # 671,026,419,200 with the 58 x 256 router biases.
    ("deepseek_v3", "671b"): 671_026_404_352,
}
"""Parameters of released files, to the last one."""


@pytest.mark.parametrize(("name", "size"), RELEASED)
def test_counts_are_the_released_ones(name, size):
    model = FAMILIES[name].SIZES[size].model
    assert count(model, model.build(), 4096).params == RELEASED[name, size]


def test_the_docs_have_the_table_of_today():
    assert table.documented() == table.table(), "run tools/family_table.py --write and say why it changed"


@pytest.mark.parametrize(("name", "size"), CASES)
def test_something_keeps_the_experts_of_every_router_in_use(name, size):
    """The sigmoid router has its bias; a softmax router has nothing but a balance loss."""
    for path, mixer in walk(FAMILIES[name].SIZES[size].model.stack):
        if isinstance(mixer, MoE):
            assert mixer.router == "sigmoid" or mixer.balance_loss or mixer.global_balance_loss, path


@pytest.mark.parametrize(("name", "size"), [("diff_transformer", "small"), ("sambay", "small-da"), ("sambay", "3.8b")])
def test_lambda_starts_by_the_number_of_the_layer(name, size):
    stack, number, seen = FAMILIES[name].SIZES[size].model.stack, 0, 0
    for part in PARTS:
        for repeat in range(stack.times(part)):
            for block in getattr(stack, part):
                for mixer in block.mixers:
                    if isinstance(mixer, DifferentialAttention | DifferentialCrossAttention):
                        first, stride = mixer.depth
                        assert first + stride * repeat == number
                        seen += 1
                number += 1
    assert seen


@pytest.mark.parametrize("name", FAMILIES if FULL else TRACED)
def test_the_step_of_a_small_model_can_be_traced(name):
    config, rules = load_config(FOLDER / f"{name}.py"), Layout().rules(jax.devices()[:1])
    specs = describe_model(config)
    optimizer = build_optimizer(config, specs)
    state = abstract_state(specs, optimizer, rules)
    step = functools.partial(train_step, optimizer=optimizer, options=step_options(config, rules, specs))
    new, metrics = jax.eval_shape(step, state, abstract_batch(rules, ROWS, LENGTH))
    assert metrics["train/loss"].shape == ()
    shapes = [{name: leaf.shape for name, leaf in named_leaves(tree)} for tree in (new.model, state.model)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", FAMILIES if FULL else TRAINED)
def test_a_small_model_learns(name):
    config, rules = load_config(FOLDER / f"{name}.py"), Layout().rules(jax.devices()[:1])
    specs = describe_model(config)
    optimizer = build_optimizer(config, specs)
    step = functools.partial(train_step, optimizer=optimizer, options=step_options(config, rules, specs))
    run = jax.jit(step)
    state = create_state(specs, optimizer, rules, seed=0)
    batch = packed_rows(np.random.default_rng(0), rows=ROWS, length=LENGTH, num_ids=64)
    losses = []
    for _ in range(4):
        state, metrics = run(state, batch)
        losses.append(float(metrics["train/loss"]))
        assert jnp.isfinite(metrics["train/grad_norm"])
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


@pytest.mark.skipif(not FULL, reason="minutes; MLT_FULL=1 runs it")
@pytest.mark.parametrize("name", FAMILIES)
def test_the_proofs_hold(name):
    config = load_config(FOLDER / f"{name}.py", args=["sequence_length=96"])
    said: list[str] = []
    assert verify(config, seed=0, say=said.append), "\n".join(said)
