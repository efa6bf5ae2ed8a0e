"""What the command makes of failures that are the machine's."""

import os
import pathlib
import subprocess
import sys

import pytest
from click.testing import CliRunner

from mlt.cli import cli

TINY = pathlib.Path(__file__).parents[1] / "faults" / "tiny.py"


def mlt(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **variables) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "mlt.cli", *map(str, words)]
    return subprocess.run(line, env=os.environ | variables, stdout=stdout, stderr=stderr, text=True, check=False)


@pytest.mark.parametrize("platform", ["tpv", "cuda"])
def test_a_device_that_is_not_there_is_one_message_and_no_run(tmp_path, platform):
    done = mlt("train", TINY, "--run-dir", tmp_path / "run", JAX_PLATFORMS=platform)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert f"mlt: JAX finds no device with JAX_PLATFORMS={platform}: " in done.stderr
    assert "or set JAX_PLATFORMS=cpu" in done.stderr
    assert not (tmp_path / "run").exists()


def test_an_output_that_cannot_be_written_is_one_line():
    with open("/dev/full", "w") as full:
        done = mlt("check", TINY, stdout=full)
    assert (done.returncode, done.stderr) == (
        1,
        "mlt: what the command prints cannot be written: No space left on device; free space\n",
    )


def test_the_exit_code_needs_no_place_to_print():
    with open("/dev/full", "w") as full:
        assert mlt("check", TINY, "--set", "train.steps=0", stderr=full).returncode == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--kills", 3), "--kills is for the resume certificate; add --resume"),
        (("--out", "there"), "--out is for the resume certificate"),
        (("--seed", 1, "--resume"), "use --set train.seed=N"),
        (("--seed", -1), "-1 is not in the range 0<=x<=4294967295"),
    ],
)
def test_an_option_that_would_not_be_looked_at_is_refused(words, says):
    done = CliRunner().invoke(cli, ["verify", str(TINY), *map(str, words)])
    assert done.exit_code == 2
    assert says in done.output


@pytest.mark.parametrize("command", ["generate", "eval", "verify"])
@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_are_those_of_a_config(tmp_path, command, seed):
    done = CliRunner().invoke(cli, [command, str(tmp_path), "--seed", str(seed)])
    assert (done.exit_code, "is not in the range" in done.output) == (2, True)
