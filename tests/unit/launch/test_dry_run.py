"""The exact job of each example site, against a golden text; a dry run writes nothing.

MLT_WRITE_GOLDENS=1 python -m pytest tests/unit/launch/test_dry_run.py      writes the goldens anew
"""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from mlt.launch.snapshot import code_digest

ROOT = pathlib.Path(__file__).parents[3]
GOLDEN = pathlib.Path(__file__).parent / "golden"
DEVICES = {"local": 2, "slurm": 16, "kubernetes": 32}


def job(dry_run, name: str, monkeypatch) -> str:
    monkeypatch.chdir(ROOT)
    sets = ("--set", f"mesh.fsdp={DEVICES[name]}", "--set", "data.batch_size=32")
    text = dry_run(ROOT / "launch" / f"{name}.toml", "--run-dir", "/runs/Tiny_1", *sets)
    text = text.replace(sys.executable, "PYTHON").replace(str(ROOT), "HERE").replace(code_digest(), "CODE")
    # The config has goldens of its own.
    return re.sub(r"(  config.yaml: \|\n)(    .*\n)+", r"\1    CONFIG\n", text)


@pytest.mark.parametrize("name", DEVICES)
def test_the_job_is_the_golden_one(dry_run, monkeypatch, name):
    text = job(dry_run, name, monkeypatch)
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("MLT_WRITE_GOLDENS"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


def test_every_example_site_has_a_golden():
    assert {path.stem for path in (ROOT / "launch").glob("*.toml")} == set(DEVICES)


@pytest.mark.parametrize("name", ["local", "slurm"])
def test_shell_reads_the_job(dry_run, monkeypatch, name):
    done = subprocess.run(["bash", "-n"], input=job(dry_run, name, monkeypatch), text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_dry_run_writes_nothing(dry_run, site, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    for name in ("local.Local", "slurm.Slurm"):
        dry_run(site(f'class = "mlt.launch.{name}"'), "--run-dir", place / "run")
    assert list(place.iterdir()) == []


def test_spaces_and_quotes_survive(dry_run, site, tmp_path):
    path = site('class = "mlt.launch.slurm.Slurm"', "[environment]", """NOTE = "it's $HOME" """)
    run_dir = tmp_path / "a run's place"
    text = dry_run(path, "--run-dir", run_dir)
    exports = "\n".join(line for line in text.splitlines() if line.startswith("export"))
    done = subprocess.run(
        ["bash", "-c", f'{exports}\nprintf "%s|%s" "$NOTE" "$PYTHONPATH"'], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"it's $HOME|{run_dir}/logs/launch/code-{code_digest()}"


def test_a_run_directory_is_launched_in_place(dry_run, site, tmp_path, monkeypatch):
    from mlt.config.dump import to_yaml
    from mlt.config.load import load_config

    run_dir = tmp_path / "runs" / "seven"
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "config.yaml").write_text(to_yaml(load_config(ROOT / "tests/faults/tiny.py")))
    path = site('class = "mlt.launch.local.Local"')
    from click.testing import CliRunner

    from mlt.cli import cli

    done = CliRunner().invoke(cli, ["launch", str(run_dir), "--on", str(path), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert f"--run-dir {run_dir} " in done.output
