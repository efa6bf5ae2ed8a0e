"""`mlt compare`: trains, is interrupted, goes on and tells what the runs' files say; refuses what cannot be compared."""

import json
import os
import pathlib
import signal
import threading
import time

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from jax.experimental.compilation_cache import compilation_cache

from mlt.cli import cli
from mlt.compare.numbers import loss_at
from mlt.errors import Preempted, RunFailed, UserError
from mlt.report.history import Series, read_history, read_rows
from mlt.run_paths import RunPaths

SMALL = str(pathlib.Path(__file__).with_name("small.py"))
STEPS, TOKENS = 40, 128


def compare(*words: object):
    """What the command says; what it raises."""
    result = CliRunner().invoke(cli, ["compare", *map(str, words)])
    if result.exception is not None:
        raise result.exception
    return result.output


def stop_after(path: pathlib.Path, step: int) -> threading.Thread:
    """Send this process a SIGTERM once the run has logged a step."""

    def watch():
        while not any(row["step"] >= step for row in read_rows(path) if "kind" not in row):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """The runs of these tests have one program; the starts after the first read it from the disk."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for values in (settings, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is settings:
            yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compiled_once):
    """A comparison whose second run was interrupted, and that went on: its folder, and what the second command said."""
    out = tmp_path_factory.mktemp("compare") / "seeds"
    words = (SMALL, "--seeds", "0,1", "--out", out)
    stopping = stop_after(out / "small-seed=1" / "metrics.jsonl", 3)
    with pytest.raises(Preempted, match=r"run 2 of 2: small-seed=1: SIGTERM.*same `mlt compare` command"):
        compare(*words)
    stopping.join()
    assert not (out / "compare.json").exists()
    return out, compare(*words)


def test_an_interrupted_comparison_goes_on_with_the_run_it_was_at(finished):
    out, said = finished
    assert "run 1 of 2: small-seed=0: complete" in said
    histories = [read_history(out / f"small-seed={seed}" / "metrics.jsonl") for seed in (0, 1)]
    assert [len(history.starts) for history in histories] == [1, 2]
    assert histories[1].starts[1]["step"] > 0
    for history in histories:
        np.testing.assert_array_equal(history.get("train/loss").steps, np.arange(1, STEPS + 1))


def test_the_table_has_what_the_files_say(finished):
    out, said = finished
    content = json.loads((out / "compare.json").read_text())
    for run in content["runs"]:
        history = read_history(RunPaths(run["path"]).metrics_path)
        assert (run["steps"], run["tokens"]) == (STEPS, STEPS * TOKENS)
        assert run["train_loss"] == pytest.approx(history.get("train/loss").values[-4:].mean())
        assert run["eval_loss"] == history.get("eval/loss").last()
        assert run["bits_per_byte"] == history.get("eval/bits_per_byte").last()
        assert run["tokens_per_second"] == pytest.approx(np.median(history.get("throughput/tokens_per_second").values))
    losses = [run["eval_loss"] for run in content["runs"]]
    assert losses[0] != losses[1]
    assert f"{np.mean(losses):.4f} ± {np.std(losses, ddof=1):.4f}" in said


def test_run_directories_are_compared_where_they_are(finished):
    out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != "run.lock"}
    with pytest.raises(UserError, match=r"small-seed=0: train\.seed: 1 -> 0"):
        compare(out / "small-seed=1", out / "small-seed=0")
    said = compare(out / "small-seed=1", out / "small-seed=0", "--anyway")
    assert said.count("complete") == 2
    assert said.index("\nsmall-seed=1 ") < said.index("\nsmall-seed=0 ")
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_other_data_and_other_steps_are_refused_by_name_before_anything_is_trained(finished, tmp_path):
    out, _ = finished
    with pytest.raises(UserError) as caught:
        compare(SMALL, "--arg", "documents=20,30", "--arg", "steps=40,41", "--out", tmp_path / "new")
    message = str(caught.value)
    assert "small-documents=30-steps=40: data.source.num_documents: 20 -> 30" in message
    assert "small-documents=20-steps=41: train.steps: 40 -> 41" in message
    assert "--anyway" in message
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match=r"small-seed=0: data\.sequence_length: 64 -> 16"):
        compare(SMALL, out / "small-seed=0", "--set", "data.sequence_length=64", "--out", tmp_path / "new")


def test_a_run_keeps_its_config(finished):
    out, _ = finished
    with pytest.raises(UserError, match=r"started with another config[\s\S]*train\.steps: 40 -> 50"):
        compare(SMALL, "--seeds", "0,1", "--arg", "steps=50", "--out", out)


def write_run(path: pathlib.Path, losses: list[float], *, corpus: str = "aa", steps: int = STEPS) -> None:
    path.mkdir(parents=True)
    rows = [{"kind": "start", "step": 0, "corpus": corpus}]
    rows += [{"step": step, "train/loss": loss, "train/tokens": step * TOKENS} for step, loss in enumerate(losses, 1)]
    rows.append({"step": len(losses), "eval/loss": losses[-1], "eval/bits_per_byte": losses[-1] / 2})
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def widths(tmp_path_factory):
    """A comparison of two widths whose metrics were written by hand."""
    out = tmp_path_factory.mktemp("widths")
    for width in (8, 24):
        write_run(out / f"small-d_ff={width}", [100.0 - step for step in range(STEPS)])
    compare(SMALL, "--arg", "d_ff=8,24", "--as-is", "--out", out)
    return out


def test_losses_are_also_compared_at_equal_flops(widths):
    content = json.loads((widths / "compare.json").read_text())
    narrow, wide = content["runs"]
    assert (narrow["label"], wide["label"]) == ("small d_ff=8", "small d_ff=24")
    assert wide["parameters"] - narrow["parameters"] == 2 * 8 * 16 == wide["active"] - narrow["active"]
    assert wide["flops_per_token"] - narrow["flops_per_token"] == 4 * 8 * 16
    assert content["equal_flops"] == 3 * narrow["flops_per_token"] * STEPS * TOKENS
    assert narrow["loss_at_equal_flops"] == narrow["train_loss"] == 100 - np.mean([36, 37, 38, 39])
    # The wide model has spent as much after fewer steps; step n has the loss 101 - n.
    steps = content["equal_flops"] / (3 * wide["flops_per_token"] * TOKENS)
    assert 0.8 * STEPS < steps < STEPS - 1
    inside = [step for step in range(1, STEPS + 1) if 0.9 * round(steps) < step <= round(steps)]
    assert wide["loss_at_equal_flops"] == pytest.approx(101 - np.mean(inside))


def test_the_table_is_written_as_markdown_and_as_a_page(widths):
    head, rule, *rows = (widths / "compare.md").read_text().split("\n\n")[0].splitlines()
    assert head.startswith("| run | parameters | active |")
    assert [row.count("|") for row in (rule, *rows)] == [head.count("|")] * 3
    page = (widths / "compare.html").read_text()
    assert page.count("<figure>") == 3, "there is no throughput"
    assert 'class="key k2">small-d_ff=24' in page
    assert "https://" not in page


def test_runs_that_read_other_documents_are_refused_unless_told(tmp_path):
    for rate, corpus in (("0.001", "aa"), ("0.002", "bb")):
        write_run(tmp_path / f"small-rate={rate}", [3.0, 2.0], corpus=corpus)
    words = (SMALL, "--arg", "rate=0.001,0.002", "--as-is", "--out", tmp_path)
    with pytest.raises(UserError, match=r"small-rate=0\.002: the documents it read: aa of small-rate=0\.001 -> bb"):
        compare(*words)
    said = compare(*words, "--anyway")
    assert "not the same: small-rate=0.002: the documents it read" in said
    assert "small-rate=0.002 is not finished: step 2 of 40" in said
    assert "besides the model: small-rate=0.002: optimizer.learning_rate: 0.001 -> 0.002" in said


def test_a_run_that_fails_leaves_the_others_their_turn(monkeypatch, tmp_path):
    def train(config, path):
        if config.optimizer.learning_rate == 0.001:
            raise RunFailed("the loss is not finite")
        write_run(path, [3.0] * STEPS)

    monkeypatch.setattr("mlt.train.loop.train", train)
    with pytest.raises(RunFailed, match=r"1 of 2 runs failed: small-rate=0\.001"):
        compare(SMALL, "--arg", "rate=0.001,0.002", "--out", tmp_path)
    first, second = json.loads((tmp_path / "compare.json").read_text())["runs"]
    assert first["failed"] == "the loss is not finite"
    assert first["train_loss"] is None
    assert second["train_loss"] == 3.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arg", "depth=1,2"], r"--arg depth: no config of this comparison takes it \(.*takes d_ff, rate, documents, steps\)"),
        (["--arg", "d_ff"], "must be name=value"),
        (["--arg", "d_ff=8,8"], "every value once"),
        (["--seeds", "0,0"], "every seed once"),
        (["--seeds", "x"], "must be numbers between commas"),
        ([SMALL], "both make a run small"),
    ],
)
def test_wrong_words_are_told(words, message, tmp_path):
    with pytest.raises(UserError, match=message):
        compare(SMALL, *words, "--out", tmp_path)


def test_a_config_needs_a_place_to_be_trained_in():
    with pytest.raises(UserError, match="--out DIR"):
        compare(SMALL)


def test_the_loss_at_a_step_is_the_mean_of_a_tenth_of_the_steps():
    loss = Series(np.arange(10.0, 110.0, 10.0), np.arange(10.0))
    assert loss_at(loss, 100) == 9.0
    assert loss_at(loss, 99.9) == loss_at(loss, 101) == 9.0
    assert loss_at(loss, 26) == 2.0
    dense = Series(np.arange(1.0, 101.0), np.arange(1.0, 101.0))
    assert loss_at(dense, 100) == np.arange(91, 101).mean()
