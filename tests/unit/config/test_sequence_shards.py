"""Layouts that cannot work are refused before anything runs, with the numbers and what would work."""

import pathlib

import pytest

from mlt.config.check import _sequence_shards, cross_section_problems
from mlt.config.load import load_config
from mlt.mixers.sequence.gated_delta import GatedDelta
from mlt.mixers.sequence.gss import GSS
from mlt.mixers.sequence.memory_caching import MemoryCaching
from mlt.mixers.sequence.parallel import Parallel
from mlt.mixers.sequence.s4d import S4D
from mlt.mixers.sequence.s5 import LRU, S5
from mlt.model.block import Block
from mlt.model.stack import Stack
from mlt.plan.text import plan_text
from mlt.train.setup import describe_model

CONFIG = pathlib.Path(__file__).parents[3] / "configs" / "quickstart.py"
ATTENTION = "model.stack.period[1].mixers[0].exchange"


def problems(*sets: str) -> dict[str, str]:
    config = load_config(CONFIG, sets=sets, check=False)
    return {p.path: f"{p.rule}; {p.ways_out}" for p in cross_section_problems(config)}


@pytest.mark.parametrize(
    ("sets", "path", "text"),
    [
        (["mesh.context=3"], "data.sequence_length", "must be a multiple of mesh.context = 3; use sequences of 510 or 513"),
        (["mesh.context=2", "mesh.attention=window"], "mesh.attention", "needs a window (model.stack.period[1].mixers[0])"),
        (["mesh.context=8", "mesh.attention=heads"], "mesh.attention", "needs 8 shards to divide the 4 heads"),
        (["mesh.context=512", "mesh.attention=zigzag"], "mesh.attention", "a multiple of 2 * 512 tokens, got 512"),
        (
            ["mesh.context=2", f'{ATTENTION}="permute"'],
            ATTENTION,
            "is no way to split Attention over sequence shards; use gather",
        ),
        (["mesh.context=2", "data.batch_size=3", "mesh.fsdp=2"], "data.batch_size", "must be a multiple of"),
    ],
)
def test_refusals(sets, path, text):
    found = problems(*sets)
    assert text in found[path]


DELTA = GatedDelta(num_heads=2, key_dim=8, value_dim=8)


@pytest.mark.parametrize(
    ("mixer", "way_out"),
    [
        *((mixer, "form='scan'") for mixer in (S4D(form="convolution"), GSS(form="convolution"))),
        *((kind(num_states=8, form="convolution"), "form='scan'") for kind in (S5, LRU)),
        (MemoryCaching(memory=DELTA, independent=False), "independent=True"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_setting_that_needs_whole_rows_is_found(mixer, way_out):
    """Nested in another mixer too; the class itself can be split."""
    config = load_config(CONFIG, sets=["mesh.context=2"], check=False)
    stack = Stack(period=(Block(mixers=(Parallel(mixers=(mixer,)),)),))
    (problem,) = _sequence_shards(config.replace(model=config.model.replace(stack=stack)))
    assert problem.path == "mesh.context"
    assert "model.stack.period[0].mixers[0].mixers[0]" in problem.rule
    assert problem.ways_out == f"use mesh.context=1, or set its {way_out}"
    split = mixer.replace(independent=True) if isinstance(mixer, MemoryCaching) else mixer.replace(form="scan")
    stack = Stack(period=(Block(mixers=(split,)),))
    assert not list(_sequence_shards(config.replace(model=config.model.replace(stack=stack))))


def test_a_layout_that_fits_is_planned():
    config = load_config(CONFIG, sets=["mesh.context=4", "mesh.carry=permute", "mesh.zero=2", f'{ATTENTION}="zigzag"'])
    plan = plan_text(config, describe_model(config))
    line = next(line for line in plan.splitlines() if line.startswith("sequence"))
    assert "Mamba2: carry by permute" in line
    assert "Attention: zigzag" in line
