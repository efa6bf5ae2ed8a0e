"""The second level: copies that are whole or do not count, a place that may fail, and a restore from either level."""

import contextlib
import json
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from mlt.checkpoint.copier import DurableOptions
from mlt.checkpoint.durable import Durable
from mlt.checkpoint.layout import CheckpointError, committed_steps
from mlt.checkpoint.restore import restore, restore_latest
from mlt.checkpoint.save import Checkpointer
from mlt.config.run import CheckpointConfig
from mlt.errors import UserError
from mlt.run_paths import RunPaths
from mlt.train.checkpoints import note_durable, open_checkpointer

TARGET = {"w": jnp.zeros((64, 64)), "step": jnp.int32(0)}


def state(step: int) -> dict:
    return {"w": jnp.asarray(np.random.default_rng(step).normal(size=(64, 64)), jnp.float32), "step": jnp.int32(step)}


def saver(folder: Path, place: object = None, **options) -> Checkpointer:
    durable = DurableOptions(place or folder / "far", options.pop("every", 1), **options)
    return Checkpointer(folder / "near", keep=2, durable=durable)


def save(checkpoints: Checkpointer, *steps: int) -> None:
    """Each with its copy: the copies of a slow disk would be skipped."""
    for step in steps:
        checkpoints.save(step, state(step), data={"at": step}, meta={"tokens": step})
        checkpoints.close()


def assert_is(found, step: int) -> None:
    assert (found.step, found.data, found.meta) == (step, {"at": step}, {"tokens": step})
    assert np.array_equal(found.state["w"], state(step)["w"])


def flip_bit(step: Path) -> None:
    path = max((path for path in (step / "state").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("scheme", ["", "file://"], ids=["path", "url"])
def test_copies_are_kept_by_their_own_rule_and_restored_when_the_local_ones_are_lost(tmp_path, scheme):
    place = f"{scheme}{tmp_path}/far"
    with saver(tmp_path, place, every=2, keep=1, keep_every_steps=4) as checkpoints:
        save(checkpoints, 1, 2, 3, 4, 5, 6, 7)
        assert checkpoints.durable_state.step == 6
        checkpoints.save(9, state(9), data={"at": 9}, meta={"tokens": 9}, durable=True)
    assert committed_steps(tmp_path / "near") == [7, 9]
    assert Durable(place).steps() == [4, 9], "the newest one, and every fourth step"
    assert sorted(path.name for path in (tmp_path / "far").iterdir() if any(path.iterdir())) == ["4", "9"]
    for step in (4, 9):
        Durable(place).check_files(step)
    shutil.rmtree(tmp_path / "near")
    with saver(tmp_path, place) as checkpoints:
        found = checkpoints.restore_latest(TARGET)
    assert_is(found, 9)
    assert found.source == f"{place}/9"


def test_a_reader_finds_the_copy_by_the_note_in_the_directory(tmp_path, caplog):
    with saver(tmp_path) as checkpoints:
        save(checkpoints, 1, 2)
    shutil.rmtree(tmp_path / "near" / "1")
    assert_is(restore(tmp_path / "near", TARGET, step=1), 1)
    assert str(tmp_path / "far") in caplog.text
    assert restore(tmp_path / "near", TARGET).source == str(tmp_path / "near" / "2")
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3 .*committed steps: 2"):
        restore(tmp_path / "near", TARGET, step=3)


def test_the_newest_whole_step_of_either_level_is_taken(tmp_path, caplog):
    with saver(tmp_path) as checkpoints:
        save(checkpoints, 1, 2, 3)
    near, far = tmp_path / "near", tmp_path / "far"
    place = Durable(far)
    found = restore_latest(near, TARGET, durable=place)
    assert found.source == str(near / "3"), "the local one of two equals"
    flip_bit(near / "3")
    found = restore_latest(near, TARGET, durable=place)
    assert_is(found, 3)
    assert found.source == str(far / "3")
    assert f"{near / '3'} is damaged" in caplog.text
    (far / "3" / "data" / "metadata").write_text("{")
    assert restore_latest(near, TARGET, durable=place).source == str(near / "2")
    shutil.rmtree(near / "2")
    assert restore_latest(near, TARGET, durable=place).source == str(far / "2")


def test_damage_at_both_levels_is_set_aside_and_saved_again(tmp_path, caplog):
    with saver(tmp_path) as checkpoints:
        save(checkpoints, 1, 2)
    flip_bit(tmp_path / "near" / "2")
    flip_bit(tmp_path / "far" / "2")
    with saver(tmp_path) as checkpoints:
        assert_is(checkpoints.restore_latest(TARGET), 1)
        assert Durable(tmp_path / "far").steps() == [1]
        assert (tmp_path / "far" / "2" / "manifest.damaged.json").exists(), "set aside, not deleted"
        assert (tmp_path / "near" / "2.damaged").is_dir()
        assert f"{tmp_path / 'far' / '2'} was set aside" in caplog.text
        save(checkpoints, 2)
    assert Durable(tmp_path / "far").steps() == [1, 2]
    Durable(tmp_path / "far").check_files(2)
    for level in ("near", "far"):
        for step in (1, 2):
            flip_bit(tmp_path / level / str(step))
    with pytest.raises(CheckpointError, match=r"near and .*far can be read: steps 2, 1 are damaged"), saver(tmp_path) as again:
        again.restore_latest(TARGET)


def test_a_copy_that_was_cut_off_does_not_count_and_is_made_again(tmp_path):
    with saver(tmp_path) as checkpoints:
        save(checkpoints, 1, 2)
    far = tmp_path / "far"
    (far / "2" / "manifest.json").unlink()
    assert Durable(far).steps() == [1]
    with saver(tmp_path) as checkpoints:
        assert_is(checkpoints.restore_latest(TARGET), 2)
    assert Durable(far).steps() == [1, 2], "a start copies the local step that the place lacks"
    Durable(far).check_files(2)


@pytest.mark.parametrize("how", ["shorter", "other bytes", "missing", "manifest"])
def test_the_check_of_a_copy_names_the_file(tmp_path, how):
    with saver(tmp_path) as checkpoints:
        save(checkpoints, 1)
    name = "manifest.json" if how == "manifest" else "state/manifest.ocdbt"
    path = tmp_path / "far" / "1" / name
    content = path.read_bytes()
    if how == "shorter":
        path.write_bytes(content[:-1])
    elif how == "other bytes":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif how == "missing":
        path.unlink()
    else:
        path.write_text(path.read_text().replace('"step": 1', '"step": 7'))
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'far' / '1'} is damaged: .*{name}"):
        Durable(tmp_path / "far").check_files(1)


def test_a_run_that_went_back_replaces_what_it_left_behind(tmp_path):
    with saver(tmp_path) as checkpoints:
        save(checkpoints, 1, 2, 3)
        assert checkpoints.discard_after(1) == [2, 3]
        assert Durable(tmp_path / "far").steps() == [1]
        checkpoints.save(2, state(20), data={"at": 20}, meta={"tokens": 20})
    shutil.rmtree(tmp_path / "near")
    with saver(tmp_path) as checkpoints:  # the place could not be reached when the run went back
        checkpoints.save(2, state(30), data={"at": 30}, meta={"tokens": 30})
    assert np.array_equal(restore_latest(tmp_path / "none", TARGET, durable=Durable(tmp_path / "far")).state["w"], state(30)["w"])


def failed(checkpoints: Checkpointer, caplog, step: int, *says: str) -> None:
    """Save a step: the local checkpoint is whole, the copy failed loudly, nothing is raised."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, "mlt.checkpoint"):
        save(checkpoints, step)
    assert checkpoints.steps()[-1] == step
    assert checkpoints.durable_state.failing
    for text in (f"ALARM: could not copy checkpoint step {step}", "Training goes on", *says):
        assert text in caplog.text, caplog.text


def test_a_place_that_cannot_be_made_or_goes_away_is_an_alarm(tmp_path, caplog):
    (tmp_path / "far").write_text("in the way")
    with saver(tmp_path) as checkpoints:
        failed(checkpoints, caplog, 1, "Not a directory", str(tmp_path / "far"))
        alarms = {}
        note_durable(checkpoints.durable_state, alarms)
        assert alarms == {"alarm/durable_failures": 1}
        (tmp_path / "far").unlink()
        save(checkpoints, 2)
        note_durable(checkpoints.durable_state, alarms)
        assert alarms == {"checkpoint/durable_step": 2}
        (tmp_path / "far").rename(tmp_path / "elsewhere")
        failed(checkpoints, caplog, 3, "the directory is gone")
        assert not (tmp_path / "far").exists(), "a mount point that lost its disk must not be filled"
        (tmp_path / "elsewhere").rename(tmp_path / "far")
        save(checkpoints, 4)
        assert (checkpoints.durable_state.step, checkpoints.durable_state.failures) == (4, 2)
    assert Durable(tmp_path / "far").steps() == [2, 4]


@contextlib.contextmanager
def mounted(place: Path, *words: str) -> Iterator[None]:
    place.mkdir(exist_ok=True)
    if subprocess.run(["mount", *words, str(place)], capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a file system here")
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_full_place_is_an_alarm_and_copied_to_again_when_there_is_room(tmp_path, caplog):
    far = tmp_path / "far"
    with mounted(far, "-t", "tmpfs", "-o", "size=512k", "tmpfs"), saver(tmp_path) as checkpoints:
        save(checkpoints, 1)
        filler = far / "filler"
        filler.write_bytes(b"x" * (300 << 10))
        with contextlib.suppress(OSError), filler.open("ab") as file:
            file.write(b"x" * (300 << 10))
        failed(checkpoints, caplog, 2, "No space left on device")
        assert Durable(far).steps() == [1]
        assert not (far / "2").exists(), "what was written of it is taken away again"
        filler.unlink()
        save(checkpoints, 3)
        assert Durable(far).steps() == [1, 3]
        assert_is(restore_latest(tmp_path / "none", TARGET, durable=Durable(far)), 3)


def test_a_read_only_place_is_an_alarm(tmp_path, caplog):
    far = tmp_path / "far"
    with mounted(far, "-t", "tmpfs", "tmpfs"), saver(tmp_path) as checkpoints:
        save(checkpoints, 1)
        subprocess.run(["mount", "-o", "remount,ro", far], check=True)
        failed(checkpoints, caplog, 2, "Read-only file system")
        assert_is(restore_latest(tmp_path / "none", TARGET, durable=Durable(far)), 1)


def test_a_place_that_hangs_delays_nothing_but_the_end_and_that_for_a_bounded_time(tmp_path, caplog):
    pipe = tmp_path / "far" / "1" / "manifest.json"
    pipe.parent.mkdir(parents=True)
    os.mkfifo(pipe)  # whoever reads it waits for a writer
    checkpoints = saver(tmp_path, wait_seconds=0.2)
    try:
        with caplog.at_level(logging.WARNING, "mlt.checkpoint"):
            for step in (1, 2, 3, 4):
                checkpoints.save(step, state(step), data={"at": step}, meta={"tokens": step})
            checkpoints.wait()
            assert checkpoints.steps() == [1, 3, 4], "a step that is being copied stays"
            checkpoints.close()
        assert "not waiting any longer" in caplog.text
        assert "the durable copy of step 2 is skipped" in caplog.text
    finally:
        with pipe.open("w"):  # lets the reader go
            pass
        checkpoints._copier.drain()
    assert checkpoints.durable_state.skipped == 2


def test_nothing_local_and_an_unreadable_place_is_an_error_not_a_fresh_start(tmp_path, caplog):
    (tmp_path / "far").write_text("in the way")
    with saver(tmp_path) as checkpoints:
        with pytest.raises(UserError, match=r"far is not a directory; there is no local checkpoint either"):
            checkpoints.restore_latest(TARGET)
        save(checkpoints, 1)
        assert_is(checkpoints.restore_latest(TARGET), 1)
    assert "using the local ones alone" in caplog.text


def test_the_config_names_the_place_of_the_run(tmp_path):
    config = CheckpointConfig(every_steps=5, durable_path=f"{tmp_path}/far/", durable_every_steps=10)
    with open_checkpointer(config, RunPaths(tmp_path / "runs" / "mine")) as checkpoints:
        save(checkpoints, 5, 10)
    assert Durable(tmp_path / "far" / "mine").steps() == [10]
    manifest = json.loads((tmp_path / "far" / "mine" / "10" / "manifest.json").read_text())
    assert manifest["files"]["data/metadata"][0] == len((tmp_path / "runs/mine/checkpoints/10/data/metadata").read_bytes())
    bad = CheckpointConfig(every_steps=10, durable_every_steps=15, keep_every_steps=20, durable_path="", durable_keep=0)
    assert {problem.path for problem in bad.problems()} == {"durable_every_steps", "durable_path", "durable_keep"}
