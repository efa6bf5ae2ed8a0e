"""Every wrong input ends with exit code 2 and one clear message, and nothing is written or lost."""

import json
import os
import subprocess

import pytest
from fault_tools import TINY, losses, wait_for_step

SMALL = ("--arg", "plain=true", "--arg", "width=16")  # compiles in a third of the time


def refused(mlt, *words, says: list[str]):
    """The command refuses with exit code 2, says these words, and shows no traceback."""
    code, output = mlt(*words)
    assert code == 2, output
    assert "Traceback" not in output, output
    for text in says:
        assert text in output, output
    return output


def train(mlt, tmp_path, *options, says):
    """A refused training run must leave no directory behind."""
    output = refused(mlt, "train", TINY, "--run-dir", tmp_path / "run", *options, says=says)
    assert not (tmp_path / "run").exists()
    return output


def data(*lines: str) -> list[str]:
    return [word for line in lines for word in ("--set", line)]


def test_unknown_key(mlt, tmp_path):
    train(mlt, tmp_path, "--set", "model.d_modle=64", says=["model.d_modle", "d_model"])


def test_wrong_type(mlt, tmp_path):
    train(mlt, tmp_path, "--set", "train.steps=many", says=["train.steps", "many"])


def test_all_problems_at_once(mlt, tmp_path):
    sets = data("train.steps=0", "optimizer.beta1=2", "data.batch_size=3", "train.grad_accumulation=2")
    train(mlt, tmp_path, *sets, says=["train.steps", "optimizer.beta1", "data.batch_size"])


def test_unknown_argument(mlt, tmp_path):
    train(mlt, tmp_path, "--arg", "widht=3", says=["widht", "width"])


def test_impossible_mesh(mlt, tmp_path):
    train(mlt, tmp_path, "--set", "mesh.fsdp=4", says=["fsdp=4", "4 devices", "1 cpu"])
    train(mlt, tmp_path, "--set", "mesh.tensor=3", says=["mesh.tensor = 3", "heads of 2", "use 1, 2"])


def test_a_model_that_no_machine_holds(mlt, tmp_path):
    width = ("--arg", "plain=true", "--arg", "width=1000000000")
    train(mlt, tmp_path, *width, says=["train state does not fit", "state of the optimizer", "train.check_memory=false"])


def test_missing_config(mlt, tmp_path):
    refused(mlt, "check", tmp_path / "absent.py", says=["absent.py"])


def test_missing_corpus(mlt, tmp_path):
    source = '{class: mlt.data.text_files.TextFiles, paths: ["absent/*.txt"]}'
    train(mlt, tmp_path, *data(f"data.source={source}"), says=["absent"])


def test_text_that_is_not_utf8_or_empty(mlt, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"good so far \xff\xfe")
    source = f'{{class: mlt.data.text_files.TextFiles, paths: ["{tmp_path}/bad.txt"]}}'
    train(mlt, tmp_path, *data(f"data.source={source}"), says=["bad.txt", "UTF-8", "12"])
    (tmp_path / "bad.txt").write_bytes(b"")
    train(mlt, tmp_path, *data(f"data.source={source}"), says=["bad.txt", "nothing to read"])


def test_truncated_json_line(mlt, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "one"}) + '\n{"text": "tw')
    source = f'{{class: mlt.data.json_lines.JsonLines, paths: ["{tmp_path}/rows.jsonl"]}}'
    train(mlt, tmp_path, *data(f"data.source={source}"), says=["rows.jsonl, line 2", "truncated"])


def test_run_directory_of_another_config_or_in_use(mlt, tmp_path):
    run_dir = tmp_path / "run"
    process = mlt.start("train", TINY, "--run-dir", run_dir, *SMALL, "--arg", "steps=400")
    wait_for_step(run_dir, 1, process)
    try:
        refused(mlt, "train", TINY, "--run-dir", run_dir, *SMALL, "--arg", "steps=400", says=["in use", str(process.pid)])
    finally:
        process.kill()
        process.wait()
    before = (run_dir / "config.yaml").read_text()
    refused(mlt, "train", TINY, "--run-dir", run_dir, *SMALL, "--arg", "steps=5", says=["train.steps", "400", "5"])
    assert (run_dir / "config.yaml").read_text() == before


def test_half_written_and_damaged_checkpoints(mlt, tmp_path):
    run_dir = tmp_path / "run"
    code, output = mlt("train", TINY, "--run-dir", run_dir, *SMALL, "--arg", "steps=12")
    assert code == 0, output
    expected = losses(run_dir)
    newest = run_dir / "checkpoints" / "12"
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    (run_dir / "checkpoints" / "16.orbax-checkpoint-tmp-1").mkdir()
    code, output = mlt("train", TINY, "--run-dir", run_dir, *SMALL, "--arg", "steps=12")
    assert code == 0, output
    assert "12" in output
    assert "resuming after step 8" in output
    assert losses(run_dir) == expected


def test_unwritable_place(mlt, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    refused(mlt, "train", TINY, "--run-dir", blocked / "run", says=[str(blocked)])
    assert blocked.read_text() == "not a directory"


def test_full_disk(mlt, tmp_path):
    """A run directory on a file system with no room left; needs the right to mount one."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("no right to mount a file system here")
    try:
        (place / "filler").write_bytes(b"x" * 60_000)
        code, output = mlt("train", TINY, "--run-dir", place / "run", "--arg", "steps=4")
        assert code in (1, 2), output
        assert "space" in output.lower(), output
        assert "Traceback" not in output, output
    finally:
        subprocess.run(["umount", place], check=True)
