"""The sweep of sparse parameters: every rho has the same parameters, in all and active, up to the rounding that it states."""

import pathlib

import pytest

from mlt.config.check import check_run
from mlt.config.load import load_config, sibling
from mlt.errors import UserError
from mlt.mixers.channel.engram import ROW_MULTIPLE, Engram
from mlt.mixers.channel.moe import MoE
from mlt.model.count import count
from mlt.train.setup import describe_model

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "sweeps" / "sparsity_allocation.py"
SCALES = sibling(str(CONFIG), CONFIG.name).SCALES
SHARES = (1.0, 0.875, 0.75, 0.5, 0.25, 0.0)


def described(size: str, rho: float):
    config = load_config(CONFIG, args=[f"size={size}", f"rho={rho}"])
    return config, count(config.model, describe_model(config), 4096)


def parts(config, kind) -> list:
    return [mixer for mixer in config.model.stack.mixers() if isinstance(mixer, kind)]


@pytest.mark.parametrize("size", SCALES)
def test_total_and_active_parameters_do_not_depend_on_the_share(size):
    scale = SCALES[size]
    pure, base = described(size, 1.0)
    run = scale.experts.num_experts_per_token
    assert base.table_params == 0
    assert not parts(pure, Engram)
    for rho in SHARES[1:]:
        config, found = described(size, rho)
        check_run(config)
        experts, engrams = parts(config, MoE), parts(config, Engram)
        assert (len(experts), len(engrams)) == (scale.layers - 1, len(scale.engram_layers))
        assert experts[0].num_experts == run + round(rho * (scale.experts.num_experts - run))
        width = scale.step / 2 * scale.unit
        assert abs(found.active_params - base.active_params) <= width
        rows = len(engrams) * ROW_MULTIPLE / 2 * scale.engram.head_dim
        assert abs(found.params - base.params) <= width + rows
        assert found.flops_per_token == pytest.approx(base.flops_per_token, rel=2e-3)
        moved = (scale.experts.num_experts - experts[0].num_experts) * scale.experts.d_ff * scale.unit
        read = sum(layer.num_tables * layer.head_dim for layer in engrams)
        assert abs(found.table_params - read - moved) <= rows


@pytest.mark.parametrize(("size", "experts", "total", "active"), [("10b", 99, 9.9e9, 993e6), ("27b", 72, 26.7e9, 3.8e9)])
def test_pure_experts_have_the_published_parameters(size, experts, total, active):
    """The stated active parameters are those of a token without the other rows of its embedding."""
    config, found = described(size, 1.0)
    assert parts(config, MoE)[0].num_experts == experts
    assert found.params == pytest.approx(total, rel=3e-3)
    assert found.active_params - config.model.vocab_size * config.model.d_model == pytest.approx(active, rel=0.011)


def test_the_published_share_has_the_experts_and_rows_of_engram_27b():
    config, found = described("27b", 0.743)
    assert parts(config, MoE)[0].num_experts == 55
    assert found.table_params == pytest.approx(5.7e9, rel=0.025)


@pytest.mark.parametrize(("words", "message"), [("rho=1.5", r"must lie in \[0, 1\]"), ("size=3b", "small, 10b, 27b")])
def test_wrong_words_are_told(words, message):
    with pytest.raises(UserError, match=message):
        load_config(CONFIG, args=[words])
