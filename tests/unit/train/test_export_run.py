"""Exporting a run: whole, read back to the bit, and never over somebody's files."""

import json

import numpy as np
import pytest
from saved_runs import save_run

from mlt.config.load import load_config
from mlt.config.run import RunConfig
from mlt.errors import UserError
from mlt.export.safetensors import export_run, read_export
from mlt.nn.param import named_leaves
from mlt.train.load import load_model


@pytest.fixture(scope="module")
def run_dir(request, tmp_path_factory):
    config = load_config(request.config.rootpath / "tests" / "faults" / "tiny.py", root=RunConfig)
    return save_run(tmp_path_factory.mktemp("run"), config, step=7, seed=3)


def test_the_export_is_the_run_s_model(run_dir, tmp_path):
    said = export_run(run_dir, tmp_path / "out")
    assert "equal bit for bit" in said
    names = {path.name for path in (tmp_path / "out").iterdir()}
    expected = {"model.safetensors", "config.json", "config.yaml", "tokenizer.json", "parameters.tsv", "receipt.json"}
    assert expected <= names
    config, model = read_export(tmp_path / "out")
    saved_config, saved, step = load_model(run_dir)
    assert (config, step) == (saved_config, 7)
    for (name, found), (_, value) in zip(named_leaves(model), named_leaves(saved), strict=True):
        np.testing.assert_array_equal(found, value, err_msg=name)
    description = json.loads((tmp_path / "out" / "config.json").read_text())
    assert description["num_hidden_layers"] == 2
    assert description["layers"] == [["GatedDelta", "MoE"], ["Attention", "SwiGLU"]]


def test_refusals(run_dir, tmp_path):
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(UserError, match="not an empty directory"):
        export_run(run_dir, tmp_path)
    with pytest.raises(UserError, match="8"):
        export_run(run_dir, tmp_path / "out", step=8)
    with pytest.raises(UserError, match="config"):
        export_run(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="not a whole export"):
        read_export(tmp_path)
