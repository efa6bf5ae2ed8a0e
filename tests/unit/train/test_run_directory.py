"""A run directory is refused before it is littered, held by one process, and keeps its config."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mlt.errors import UserError
from mlt.train.run_directory import RunDirectory

HOLD = """
import sys, time
from mlt.train.run_directory import RunDirectory
with RunDirectory(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(100)
"""


def hold(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def take(path: Path) -> None:
    with RunDirectory(path).lock():
        pass


def lines(old: str, new: str) -> list[str]:
    return [f"{a} -> {b}" for a, b in zip(old.split(), new.split(), strict=True) if a != b]


def test_one_holder_and_no_stale_lock_after_kill(tmp_path):
    process = hold(tmp_path / "run")
    try:
        with pytest.raises(UserError) as caught:
            take(tmp_path / "run")
        for part in (str(tmp_path / "run"), f"process {process.pid}", socket.gethostname()):
            assert part in str(caught.value)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=20)
        take(tmp_path / "run")
    finally:
        process.kill()


def test_the_same_process_cannot_hold_it_twice_but_can_again(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    with directory.lock(), pytest.raises(UserError, match=f"process {os.getpid()} "):
        take(tmp_path / "run")
    take(tmp_path / "run")


def test_a_directory_nothing_was_written_in_is_removed(tmp_path):
    take(tmp_path / "a" / "run")
    assert os.listdir(tmp_path) == []
    with RunDirectory(tmp_path / "run").lock():
        RunDirectory(tmp_path / "run").write_config("a: 1")
    assert (tmp_path / "run" / "config.yaml").read_text() == "a: 1"
    (tmp_path / "given").mkdir()
    take(tmp_path / "given")
    assert (tmp_path / "given").is_dir()


def end(directory: RunDirectory, error: Exception, *, begun: bool = False, config: bool = True) -> None:
    """A run that writes what a start writes, and ends with an error."""
    with directory.lock():
        directory.logs_path.mkdir()
        if config:
            directory.write_config("a: 1")
            directory.collisions_path.write_text("{}")
        directory.begun = begun
        raise error


@pytest.mark.parametrize("begun", [False, True])
def test_a_refused_run_leaves_nothing_unless_it_has_begun(tmp_path, begun):
    directory = RunDirectory(tmp_path / "a" / "run")
    with pytest.raises(UserError, match="too large"):
        end(directory, UserError("too large"), begun=begun)
    assert directory.collisions_path.exists() == begun
    assert os.listdir(tmp_path) == ["a"] * begun


def test_a_refused_run_leaves_a_directory_that_was_there(tmp_path):
    directory = RunDirectory(tmp_path)
    with pytest.raises(UserError, match="too large"):
        end(directory, UserError("too large"))
    assert directory.config_path.exists()


def test_a_failure_leaves_its_traces_but_no_empty_folders(tmp_path):
    """A bug or a full device is no refusal: what was written may tell why."""
    directory = RunDirectory(tmp_path / "run")
    with pytest.raises(RuntimeError):
        end(directory, RuntimeError(), config=False)
    assert os.listdir(tmp_path) == []
    with pytest.raises(RuntimeError):
        end(directory, RuntimeError())
    assert directory.config_path.exists()


def test_a_path_that_cannot_be_a_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=f"{tmp_path / 'file'} is not a directory"):
            take(path)
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(UserError, match="File name too long"):
        take(tmp_path / ("x" * 300))


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a directory that nobody can write")
def test_a_directory_that_cannot_be_written_is_refused():
    with pytest.raises(UserError, match="/proc"):
        take(Path("/proc/run"))
    with pytest.raises(UserError, match="cannot be written"):
        RunDirectory("/proc/self/task")._probe()


def test_a_lock_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "run.lock").mkdir()
    with pytest.raises(UserError, match=r"cannot lock .*run\.lock: Is a directory; .*--run-dir"), RunDirectory(tmp_path).lock():
        pass


def test_a_full_disk_is_found_before_the_run(tmp_path):
    code = (
        "import resource, sys\nfrom mlt.errors import UserError\nfrom mlt.train.run_directory import RunDirectory\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    RunDirectory(sys.argv[1]).lock().__enter__()\nexcept UserError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True, timeout=60)
    assert f"{tmp_path / 'run'} cannot be written: File too large" in done.stdout, done.stderr
    assert not (tmp_path / "run").exists()


def test_a_foreign_directory_is_not_littered(tmp_path):
    for name in ("thesis.tex", "figures"):
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=r"not a run directory.*figures, thesis\.tex"):
        take(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["figures", "thesis.tex"]


def test_what_a_launcher_leaves_is_no_hindrance(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "plan.txt").write_text("")
    take(tmp_path)


def test_another_config_is_refused_with_the_difference(tmp_path):
    directory = RunDirectory(tmp_path)
    assert not directory.check_config("a b c", lines)
    directory.write_config("a b c")
    assert directory.check_config("a b c", lines)
    assert directory.check_config("a  b  c", lines), "the same config in another layout"
    with pytest.raises(UserError) as caught:
        directory.check_config("a x c", lines)
    assert "b -> x" in str(caught.value)
    assert str(directory.config_path) in str(caught.value)
    directory.write_config("a  b  c")
    assert directory.config_path.read_text() == "a b c"
    assert sorted(os.listdir(tmp_path)) == ["config.yaml"]


def test_a_long_difference_is_cut(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.write_config("old " * 50)
    with pytest.raises(UserError, match=r"and 30 more"):
        directory.check_config("new " * 50, lines)
