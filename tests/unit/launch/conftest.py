"""Dry runs of the command, in a place that is the same everywhere."""

import importlib.util
import pathlib

import pytest
from click.testing import CliRunner

from mlt.cli import cli
from mlt.errors import UserError

ROOT = pathlib.Path(__file__).parents[3]
TINY = ROOT / "tests" / "faults" / "tiny.py"


@pytest.fixture
def dry_run(monkeypatch):
    """(site, words) -> the job that would be launched."""
    monkeypatch.delenv("PYTHONPATH", raising=False)

    def run(site, *words) -> str:
        line = ["launch", TINY, "--on", site, "--dry-run", *words]
        done = CliRunner().invoke(cli, [str(word) for word in line], catch_exceptions=True)
        if isinstance(done.exception, UserError):
            raise done.exception
        assert done.exit_code == 0, done.output
        return done.output

    return run


@pytest.fixture
def site(tmp_path):
    """A site file of some lines."""

    def write(*lines: str) -> pathlib.Path:
        path = tmp_path / "site.toml"
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


@pytest.fixture(scope="session")
def schema():
    """The schemas of Kubernetes, see kubernetes_schema.py."""
    spec = importlib.util.spec_from_file_location("mlt_kubernetes_schema", pathlib.Path(__file__).parent / "kubernetes_schema.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
