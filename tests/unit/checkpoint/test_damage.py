"""Damaged, half-written and failed checkpoints: named, stepped over, never mistaken for good ones."""

import errno
import logging
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from mlt.checkpoint.layout import CheckpointError, StepFiles, Unreadable, committed_steps, read_meta, step_files, unfinished
from mlt.checkpoint.restore import restore, restore_latest
from mlt.checkpoint.save import Checkpointer
from mlt.checkpoint.show import list_text, verify_text
from mlt.checkpoint.storage import is_passing
from mlt.errors import UserError

TARGET = {"w": jnp.zeros((64, 64)), "step": jnp.int32(0)}


def state(step: int) -> dict:
    return {"w": jnp.asarray(np.random.default_rng(step).normal(size=(64, 64)), jnp.float32), "step": jnp.int32(step)}


def save_steps(directory: Path, *steps: int) -> None:
    with Checkpointer(directory, keep=5) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step), data={"at": step}, meta={"tokens": step * 10})


def arrays_file(step: Path) -> Path:
    return max((path for path in (step / "state").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_bit(step: Path) -> None:
    path = arrays_file(step)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(step: Path) -> None:
    path = arrays_file(step)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit_meta(step: Path) -> None:
    path = step / "meta" / "metadata"
    path.write_text(path.read_text().replace('"tokens": 20', '"tokens": 21'))


def edit_data(step: Path) -> None:
    path = step / "data" / "metadata"
    path.write_text(path.read_text().replace('"at": 2', '"at": 3'))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "flipped bit": flip_bit,
    "truncated array file": truncate,
    "deleted array file": lambda step: arrays_file(step).unlink(),
    "deleted manifest": lambda step: (step / "state" / "manifest.ocdbt").unlink(),
    "deleted meta": lambda step: (step / "meta" / "metadata").unlink(),
    "torn meta": lambda step: (step / "meta" / "metadata").write_text('{"format": 1'),
    "altered meta": edit_meta,
    "altered data": edit_data,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_step_is_named_and_stepped_over(tmp_path, caplog, damage):
    save_steps(tmp_path, 1, 2)
    DAMAGE[damage](tmp_path / "2")
    with pytest.raises(CheckpointError, match=f"{tmp_path / '2'} is damaged"):
        restore(tmp_path, TARGET, step=2)
    with pytest.raises(CheckpointError, match=f"{tmp_path / '2'} is damaged"):
        restore(tmp_path, TARGET)
    with caplog.at_level(logging.WARNING, "mlt.checkpoint"):
        found = restore_latest(tmp_path, TARGET)
    assert found is not None
    assert (found.step, found.data, found.meta) == (1, {"at": 1}, {"tokens": 10})
    assert np.array_equal(found.state["w"], state(1)["w"])
    assert f"{tmp_path / '2'} is damaged" in caplog.text
    assert committed_steps(tmp_path) == [1, 2], "a reader must not change the directory"


def test_the_writer_sets_damaged_steps_aside_and_saves_them_again(tmp_path):
    save_steps(tmp_path, 1, 2, 3)
    flip_bit(tmp_path / "2")
    truncate(tmp_path / "3")
    with Checkpointer(tmp_path, keep=5) as checkpoints:
        found = checkpoints.restore_latest(TARGET)
        assert found is not None
        assert found.step == 1
        assert (tmp_path / "2.damaged").is_dir()
        assert (tmp_path / "3.damaged").is_dir()
        assert checkpoints.save(2, state(2), data={"at": 2}, meta={})
    assert committed_steps(tmp_path) == [1, 2]
    flip_bit(tmp_path / "2")
    with Checkpointer(tmp_path, keep=5) as checkpoints:
        checkpoints.restore_latest(TARGET)
        assert (tmp_path / "2.damaged-1").is_dir()


def test_nothing_readable_is_an_error_not_a_fresh_start(tmp_path):
    save_steps(tmp_path, 1, 2)
    flip_bit(tmp_path / "1")
    flip_bit(tmp_path / "2")
    with pytest.raises(CheckpointError, match="steps 2, 1 are damaged"):
        restore_latest(tmp_path, TARGET)


def test_when_all_are_damaged_it_is_said_what_follows(tmp_path):
    directory = tmp_path / "checkpoints"
    save_steps(directory, 1)
    flip_bit(directory / "1")
    with (
        Checkpointer(directory) as checkpoints,
        pytest.raises(CheckpointError, match=r"were set aside and not deleted\. .*; the same command once more begins again"),
    ):
        checkpoints.restore_latest(TARGET)
    assert verify_text(str(tmp_path)) == (f"nothing to verify: no committed checkpoints in {directory}", False)
    with pytest.raises(CheckpointError, match=r"these were damaged and set aside: 1\.damaged"):
        restore(directory, TARGET)


def test_what_cannot_be_read_for_now_is_no_damage(tmp_path, monkeypatch):
    """Its files are whole: taking an older step instead would lose steps, and setting it aside would hide it."""
    save_steps(tmp_path, 1, 2)

    def denied(path: Path, step: int | None = None) -> StepFiles:
        files = step_files(path, step)
        return files if files.step == 1 else files._replace(read=lambda name: (_ for _ in ()).throw(refusal))

    refusal = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "2" / "meta" / "metadata"))
    with monkeypatch.context() as patch, Checkpointer(tmp_path) as checkpoints:
        patch.setattr("mlt.checkpoint.restore.step_files", denied)
        with pytest.raises(Unreadable, match=r"2 cannot be read: .*Permission denied.*give the same command again"):
            checkpoints.restore_latest(TARGET)
    assert committed_steps(tmp_path) == [1, 2]
    assert restore_latest(tmp_path, TARGET).step == 2


def test_reads_that_fail_for_reasons_that_pass_are_told_from_damage():
    passing = ("UNAVAILABLE: no route", "ABORTED: All 6 retry attempts failed: CURL error", "x [os_error_code='13']")
    lasting = ("DATA_LOSS: bad checksum", "NOT_FOUND: gone", "FAILED_PRECONDITION: short", "x [os_error_code='5']")
    assert all(is_passing(ValueError(text)) for text in passing)
    assert not any(is_passing(ValueError(text)) for text in lasting)
    assert is_passing(OSError(errno.ESTALE, "Stale file handle"))
    assert not is_passing(FileNotFoundError(errno.ENOENT, "No such file"))


def test_what_a_newer_version_wrote_is_refused_and_left_alone(tmp_path):
    save_steps(tmp_path, 1, 2)
    path = tmp_path / "2" / "meta" / "metadata"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with Checkpointer(tmp_path) as checkpoints, pytest.raises(UserError, match=r"format 2, .*reads format 1: .*newer"):
        checkpoints.restore_latest(TARGET)
    assert committed_steps(tmp_path) == [1, 2]
    assert "newer format" in list_text(str(tmp_path))
    text, whole = verify_text(str(tmp_path))
    assert not whole
    assert "has format 2" in text


@pytest.mark.parametrize("broken", ["", "{}", '{"commit_timestamp_nsecs": null}', "not json"])
def test_a_step_directory_without_commit_time_does_not_count(tmp_path, caplog, broken):
    save_steps(tmp_path, 1, 2)
    (tmp_path / "2" / "_CHECKPOINT_METADATA").write_text(broken)
    (tmp_path / "notes.txt").write_text("mine")
    assert committed_steps(tmp_path) == [1]
    assert unfinished(tmp_path) == [tmp_path / "2"]
    with Checkpointer(tmp_path, keep=2) as checkpoints:
        with caplog.at_level(logging.WARNING, "mlt.checkpoint"):
            assert checkpoints.latest_step() == 1
        assert str(tmp_path / "2") in caplog.text
        for step in (2, 3):
            checkpoints.save(step, state(step), data={}, meta={})
    assert committed_steps(tmp_path) == [2, 3]
    assert np.array_equal(restore(tmp_path, TARGET, step=2).state["w"], state(2)["w"])


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    start = "import os, sys, resource\nimport jax.numpy as jnp, numpy as np\nfrom mlt.checkpoint.save import Checkpointer\n"
    return subprocess.run(
        [sys.executable, "-c", start + textwrap.dedent(code), *map(str, arguments)], capture_output=True, text=True, timeout=100
    )


def test_kill_during_a_save_leaves_the_last_step_good(tmp_path, caplog):
    killed = run(
        """
        from mlt.checkpoint.layout import unfinished
        checkpoints = Checkpointer(sys.argv[1])
        big = {"w": jnp.asarray(np.random.default_rng(0).random((3000, 3000), np.float32))}
        checkpoints.save(1, big, data={}, meta={"n": 1})
        checkpoints.save(2, big, data={}, meta={"n": 2})
        while not unfinished(sys.argv[1]):
            pass
        os.kill(os.getpid(), 9)
        """,
        tmp_path,
    )
    assert killed.returncode == -9, killed.stderr
    assert committed_steps(tmp_path) == [1]
    assert len(unfinished(tmp_path)) == 1
    target = {"w": jnp.zeros((3000, 3000))}
    with Checkpointer(tmp_path) as checkpoints:
        with caplog.at_level(logging.WARNING, "mlt.checkpoint"):
            found = checkpoints.restore_latest(target)
        assert found is not None
        assert found.meta == {"n": 1}
        assert f"{tmp_path}/2" in caplog.text
        checkpoints.save(2, found.state, data={}, meta={"n": 3})
    assert committed_steps(tmp_path) == [1, 2]
    assert read_meta(tmp_path, 2) == {"n": 3}
    assert unfinished(tmp_path) == []


def test_a_failed_write_is_raised_quietly_and_the_next_save_works(tmp_path):
    done = run(
        """
        from mlt.checkpoint.layout import CheckpointError
        state = {"w": jnp.asarray(np.random.default_rng(0).random((1000, 1000), np.float32))}
        checkpoints = Checkpointer(sys.argv[1])
        checkpoints.save(1, state, data={}, meta={})
        checkpoints.wait()
        free = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, free[1]))
        try:
            checkpoints.save(2, state, data={}, meta={})
            checkpoints.wait()
        except CheckpointError as error:
            print(error)
        assert checkpoints.steps() == [1]
        resource.setrlimit(resource.RLIMIT_FSIZE, free)
        for step in (2, 3):
            checkpoints.save(step, state, data={}, meta={})
        checkpoints.close()
        print(checkpoints.steps())
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    message, steps = done.stdout.rsplit("\n", 2)[:2]
    assert f"could not write checkpoint {tmp_path / '2'}" in message
    assert "File too large" in message
    assert steps == "[1, 2, 3]"
    assert done.stderr == ""


def test_going_back_over_damage_prints_one_line_a_step(tmp_path):
    save_steps(tmp_path, 1, 2, 3)
    truncate(tmp_path / "2")
    arrays_file(tmp_path / "3").unlink()
    done = run(
        """
        import gc, time
        from mlt.checkpoint.restore import restore_latest
        target = {"w": jnp.zeros((64, 64)), "step": jnp.int32(0)}
        print(restore_latest(sys.argv[1], target).step)
        gc.collect(), time.sleep(0.2), gc.collect()
        """,
        tmp_path,
    )
    assert done.stdout == "1\n"
    first, second = done.stderr.splitlines()
    assert f"{tmp_path / '3'} is damaged" in first
    assert f"{tmp_path / '2'} is damaged" in second


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'file' / 'c'}: Not a directory"):
        Checkpointer(tmp_path / "file" / "c").save(1, state(1), data={}, meta={})
