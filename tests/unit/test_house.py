"""Rules of the house that a machine can check."""

import pathlib
import subprocess
import sys

from tool_files import tool

ROOT = pathlib.Path(__file__).parents[2]


def test_imports_point_down():
    assert tool("imports").wrong_ways() == []


def test_files_stay_small():
    limits = {"mlt": 600, "kernels": 900}
    long = [
        f"{path.relative_to(ROOT)}: {len(path.read_text().splitlines())}"
        for folder, limit in limits.items()
        for path in (ROOT / folder).rglob("*.py")
        if len(path.read_text().splitlines()) > limit
    ]
    assert long == []


def test_the_folder_kernels_is_not_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import kernels; assert not hasattr(kernels, 'attention'), kernels"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    # Either the name is free (an empty namespace package here), or another distribution owns it.
    assert done.returncode == 0 or "ModuleNotFoundError" in done.stderr


def test_help_and_wrong_words_answer_without_jax():
    code = (
        "import sys; from click.testing import CliRunner; from mlt.cli import cli\n"
        "r = CliRunner().invoke(cli, ['--help']); assert r.exit_code == 0 and 'train' in r.output, r.output\n"
        "r = CliRunner().invoke(cli, ['trian']); assert r.exit_code == 2, r.output\n"
        "r = CliRunner().invoke(cli, ['train', 'x.py']); assert r.exit_code == 2 and '--run-dir' in r.output, r.output\n"
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
