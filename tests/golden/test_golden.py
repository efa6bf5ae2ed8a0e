"""Configs describe the models that they described yesterday."""

import pytest
from tool_files import tool

golden = tool("golden")


@pytest.mark.parametrize("path", golden.configs(), ids=lambda path: path.stem)
def test_parameter_table(path):
    assert golden.golden_text(path) == golden.golden_path(path).read_text(), "run tools/golden.py and say why it changed"
