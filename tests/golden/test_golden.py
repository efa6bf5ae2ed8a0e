"""Configs describe the models that they described yesterday."""

import importlib.util
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def _tool(name: str):
    spec = importlib.util.spec_from_file_location(f"mlt_tools_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


golden = _tool("golden")


@pytest.mark.parametrize("path", golden.configs(), ids=lambda path: path.stem)
def test_parameter_table(path):
    assert golden.golden_text(path) == golden.golden_path(path).read_text(), "run tools/golden.py and say why it changed"
