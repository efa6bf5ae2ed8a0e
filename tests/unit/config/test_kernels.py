"""Backends in a config: a name, or several that are tried in order; each must be one that the op has."""

import pathlib

import pytest

from mlt.config.check import cross_section_problems
from mlt.config.dump import to_yaml
from mlt.config.load import load_config

CONFIG = pathlib.Path(__file__).parents[3] / "configs" / "quickstart.py"
FIELD = "model.stack.period[1].mixers[0].kernel"


@pytest.mark.parametrize("value", ["chunked", '["cudnn", "chunked"]'])
def test_a_name_and_several_names(value, tmp_path):
    config = load_config(CONFIG, sets=[f"{FIELD}={value}"])
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(config))
    assert load_config(saved).model == config.model
    assert config.model.stack.period[1].mixers[0].kernel in ("chunked", ("cudnn", "chunked"))


def test_each_name_must_be_a_backend():
    config = load_config(CONFIG, sets=[f'{FIELD}=["cudn", "chunked"]'], check=False)
    (problem,) = cross_section_problems(config)
    assert (problem.path, problem.value) == (FIELD, "cudn")
    assert problem.ways_out.startswith("did you mean 'cudnn'?")
