"""`mlt checkpoint list, inspect, diff, verify`: what they say is what lies there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlt.checkpoint import compare
from mlt.checkpoint.copier import DurableOptions
from mlt.checkpoint.layout import CheckpointError, unreadable
from mlt.checkpoint.save import Checkpointer
from mlt.checkpoint.show import diff_text, inspect_text, list_text, verify_text
from mlt.errors import UserError


def state(step: int) -> dict:
    return {
        "w": jnp.asarray(np.random.default_rng(0).normal(size=(40, 30)), jnp.float32).at[3, 4].add(step / 4),
        "half": jnp.ones((6,), jnp.bfloat16),
        "key": jax.random.key(0),
        "step": jnp.int32(step),
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run directory with local steps 2 and 3, and durable ones 1 to 3."""
    folder = tmp_path_factory.mktemp("made")
    durable = DurableOptions(folder / "far", 1)
    with Checkpointer(folder / "run" / "checkpoints", keep=2, durable=durable) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state(step), data={"at": step}, meta={"tokens": step * 10, "mesh": {"fsdp": 1}})
            checkpoints.close()
    return folder


@pytest.fixture
def run(made, tmp_path):
    """A copy of that run to damage; it names the copy of the durable place."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    (tmp_path / "run" / "checkpoints" / "durable").write_text(str(tmp_path / "far"))
    return tmp_path / "run"


def rows(text: str) -> list[tuple[str, ...]]:
    """(step, level, state) of each line of a table."""
    return [tuple(line.split()[:3]) for line in text.splitlines() if line.strip()[:1].isdigit()]


def flip_bit(step: Path) -> None:
    path = max((path for path in (step / "state").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_list_shows_every_step_with_level_and_state(run):
    local = run / "checkpoints"
    assert rows(list_text(str(run))) == [
        ("3", "local", "committed"),
        ("3", "durable", "committed"),
        ("2", "local", "committed"),
        ("2", "durable", "committed"),
        ("1", "durable", "committed"),
    ]
    assert rows(list_text(str(local), "local")) == [("3", "local", "committed"), ("2", "local", "committed")]
    far = [("3", "durable", "committed"), ("2", "durable", "committed"), ("1", "durable", "committed")]
    assert rows(list_text(str(run.parent / "far"))) == rows(list_text(f"file://{run.parent}/far")) == far
    size = sum(path.stat().st_size for path in (local / "3").rglob("*") if path.is_file())
    assert f"{size / 1000:.3g} kB" in list_text(str(local)).splitlines()[2]
    (local / "2").rename(local / "2.damaged")
    (local / "3" / "meta" / "metadata").write_text("{")
    (local / "9").mkdir()
    (local / "10.orbax-checkpoint-tmp").mkdir()
    (run.parent / "far" / "2" / "manifest.json").unlink()
    (run.parent / "far" / "1" / "manifest.json").rename(run.parent / "far" / "1" / "manifest.damaged.json")
    (run.parent / "far" / "3" / "manifest.json").write_text("torn")
    text = list_text(str(run))
    assert rows(text) == [
        ("10", "local", "unfinished"),
        ("9", "local", "unfinished"),
        ("3", "local", "damaged"),
        ("3", "durable", "damaged"),
        ("2", "local", "set"),
        ("2", "durable", "unfinished"),
        ("1", "durable", "set"),
    ]
    assert "cannot read meta/metadata: it is not JSON" in text
    assert "manifest.json is cut off or altered" in text


def test_inspect_shows_the_tree_and_the_records(run):
    text = inspect_text(str(run))
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert text.startswith(f"step 3, local: {run / 'checkpoints' / '3'}\n")
    assert lines["w"][1:3] == ["float32[40,30]", "4,800"]
    assert lines["half"][1:3] == ["bfloat16[6]", "12"]
    assert lines["key"][1] == "key<fry>[]"
    assert "4 arrays, 4,816 bytes" in text
    assert 'meta  {"tokens": 30, "mesh": {"fsdp": 1}}' in text
    assert 'data  {"at": 3}' in text
    assert inspect_text(str(run), 1).startswith(f"step 1, durable: {run.parent / 'far' / '1'}\n")
    assert inspect_text(str(run), 3, "durable").startswith("step 3, durable")
    with pytest.raises(UserError, match=r"no checkpoint of step 7 in .*committed steps: 3, 2, 1"):
        inspect_text(str(run), 7)


def test_inspect_shows_how_arrays_lay_on_the_mesh(tmp_path):
    code = """
import sys, jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from mlt.checkpoint.save import Checkpointer
mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"))
place = lambda *spec: jax.device_put(np.ones((4, 8), np.float32), NamedSharding(mesh, P(*spec)))
with Checkpointer(sys.argv[1]) as checkpoints:
    checkpoints.save(1, {"a": place("fsdp"), "b": place(None, ("fsdp", "tensor")), "c": place()}, data={}, meta={})
"""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=True, timeout=100)
    lines = {line[:1]: line.split("128")[-1].strip() for line in inspect_text(str(tmp_path)).splitlines()}
    assert (lines["a"], lines["b"], lines["c"]) == ("fsdp=2", "-, fsdp=2*tensor=2", "whole")


def test_diff_says_what_differs_and_by_how_much(run):
    near, far = run / "checkpoints", run.parent / "far"
    text, different = diff_text(f"{run}@3", str(far / "3"))
    assert (different, "equal: 4 arrays to the bit" in text) == (False, True)
    text, different = diff_text(str(near / "2"), f"{far}@3")
    assert different
    found = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in text.splitlines()}
    assert found["w"] == "1 elements differ, by 0.25 at most"
    assert found["step"] == "1 elements differ, by 1 at most"
    assert found["meta: tokens"] == "20 and 30"
    assert found["data: at"] == "2 and 3"
    assert "2 arrays are equal, 4 entries differ" in text


def test_diff_of_other_trees_types_and_nothing_but_bits(tmp_path):
    one = {"a": jnp.ones(3), "b": jnp.zeros(2), "c": jnp.arange(4.0), "nan": jnp.array([jnp.nan, 1.0, 2.0])}
    two = {"d": jnp.ones(3), "b": -jnp.zeros(2), "c": jnp.arange(4, dtype=jnp.int32), "nan": jnp.array([jnp.nan, jnp.nan, 2.5])}
    for name, tree in (("one", one), ("two", two)):
        with Checkpointer(tmp_path / name) as checkpoints:
            checkpoints.save(1, tree, data={}, meta={})
    text, _ = diff_text(str(tmp_path / "one"), str(tmp_path / "two"))
    found = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in text.splitlines()}
    assert found["a"] == "only in the first"
    assert found["d"] == "only in the second"
    assert found["b"] == "equal in value, not in bits"
    assert found["c"] == "float32 and int32; equal in value, not in bits"
    assert found["nan"] == "2 elements differ, by nan at most"


def test_verify_reads_what_list_does_not(run):
    text, whole = verify_text(str(run))
    assert (whole, len(rows(text))) == (True, 5)
    flip_bit(run / "checkpoints" / "3")
    flip_bit(run.parent / "far" / "2")
    assert rows(list_text(str(run)))[0] == ("3", "local", "committed")
    text, whole = verify_text(str(run))
    assert not whole
    assert [row for row in rows(text) if row[2] == "damaged"] == [("3", "local", "damaged"), ("2", "durable", "damaged")]
    assert "damaged: 2 of 5 checkpoints; a resume takes step 3" in text
    assert f"{run / 'checkpoints' / '3'} is damaged: the bits of" in text
    with pytest.raises(CheckpointError, match="the bits of"):
        diff_text(f"{run}@2", f"{run / 'checkpoints'}@3")


def test_verify_takes_no_missing_right_for_damage(run, monkeypatch):
    def denied(files):
        if files.step == 3 and "far" not in files.name:
            raise unreadable(files.name, "Permission denied")
        return found(files)

    found = compare._verify_arrays
    monkeypatch.setattr(compare, "_verify_arrays", denied)
    text, whole = verify_text(str(run))
    assert not whole
    assert [row[2] for row in rows(text)] == ["unreadable", *["whole"] * 4]
    assert "unreadable: 1 of 5 checkpoints; a resume ends with exit code 2 until the newest one can be read" in text
    flip_bit(run / "checkpoints" / "2")
    assert "damaged: 1 of 5, unreadable: 1 of 5 checkpoints" in verify_text(str(run))[0]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda place: None, "is not a directory"),
        (lambda place: place.mkdir(), "holds no checkpoints"),
        (lambda place: (place / "checkpoints").mkdir(parents=True), None),
        (lambda place: (place.mkdir(), (place / "config.yaml").touch()), "has saved no checkpoint yet"),
    ],
)
def test_a_place_without_checkpoints_says_which_it_is(tmp_path, make, says):
    place = tmp_path / "place"
    make(place)
    if says is None:
        assert list_text(str(place)) == f"no checkpoints in {place / 'checkpoints'}"
        return
    with pytest.raises(UserError, match=f"{place} {says}"):
        list_text(str(place))
    with pytest.raises(UserError, match=says):
        diff_text(str(place), str(place))


def test_exit_codes_of_the_command(run):
    flip_bit(run / "checkpoints" / "2")
    near = run / "checkpoints"
    cases = [(("diff", f"{run}@3", near / "3"), 0), (("diff", f"{run}@3", f"{run.parent}/far@1"), 1), (("verify", run), 1)]
    cases += [(("list", run / "none"), 2), (("inspect", run, "--step", 8), 2)]
    lines = [[sys.executable, "-m", "mlt.cli", "checkpoint", *map(str, words)] for words, _ in cases]
    started = [subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for line in lines]
    for process, (words, code) in zip(started, cases, strict=True):
        output, _ = process.communicate(timeout=100)
        assert process.returncode == code, (words, output)
        assert "Traceback" not in output
