"""Runs that meet what a guard is for: poisoned documents, diverging models, requests to stop anywhere, full disks.

Each runs in this process with a model that compiles in a second. The causes are real: a parameter that holds an infinity makes
the loss of every row with its token infinite.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest
from fault_tools import TINY, losses, rows

from mlt.checkpoint.layout import committed_steps, read_leaves, read_meta, read_record, step_path
from mlt.checkpoint.save import Checkpointer
from mlt.config.dump import config_hash, to_yaml
from mlt.config.run import CheckpointConfig, EvalConfig, RunConfig, SampleConfig, TrainConfig
from mlt.data.json_lines import JsonLines
from mlt.data.loader import DataConfig
from mlt.data.synthetic import SyntheticText
from mlt.errors import Preempted, RunFailed, UserError
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack
from mlt.nn.param import path_name
from mlt.optim.adamw import AdamW
from mlt.optim.schedule import WarmupCosine
from mlt.parallel.mesh import Layout
from mlt.report.goodput import Account
from mlt.report.page import write_report
from mlt.report.sinks import LogConfig
from mlt.train.guard import GuardConfig
from mlt.train.loop import train
from mlt.train.setup import build_optimizer, describe_model
from mlt.train.state import create_state

STEPS, ROWS, LENGTH = 14, 8, 16
POISON = "Z"


@pytest.fixture(autouse=True, scope="module")
def compiled_once(tmp_path_factory) -> Iterator[None]:
    """All runs of this file share their compiled programs."""
    before = {"jax_compilation_cache_dir": None, "jax_persistent_cache_min_compile_time_secs": None}
    before = {name: getattr(jax.config, name) for name in before}
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def config(source, *, steps: int = STEPS, evaluation: EvalConfig | None = None, every: int = 2, **train) -> RunConfig:
    data = {"validation_fraction": 0.0 if evaluation is None else 0.5, "shuffle_documents": False, "shuffle_block_rows": 1}
    return RunConfig(
        model=LMConfig(d_model=16, vocab_size=272, stack=Stack(period=(Block(mixers=(SwiGLU(d_ff=16),)),), repeats=1)),
        data=DataConfig(source=source, sequence_length=LENGTH, batch_size=ROWS, **data),
        train=TrainConfig(steps=steps, compute_dtype="float32", **train),
        optimizer=AdamW(learning_rate=3e-3),
        schedule=WarmupCosine(warmup_steps=4),
        mesh=Layout(fsdp=jax.device_count()),
        checkpoint=CheckpointConfig(every_steps=every, keep=20),
        evaluation=evaluation or EvalConfig(),
        sample=SampleConfig(tokens=0),
        log=LogConfig(every_steps=1),
    )


def documents(path: pathlib.Path, poisoned: set[int]) -> JsonLines:
    """A document a batch: each has as many targets as a batch; those of the given steps hold the poisoned letter."""
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for step in range(1, 60):
            letters = rng.choice(list("abcdefgh"), ROWS * LENGTH - 1)
            if step in poisoned:
                letters[5] = POISON
            file.write(json.dumps({"text": "".join(letters)}) + "\n")
    return JsonLines(paths=(str(path),))


def poison(run: RunConfig, run_dir: pathlib.Path, tokens: list[int]) -> None:
    """Give a run a step 0 whose embedding is infinite at some tokens, as an imported model would come."""
    specs = describe_model(run)
    state = create_state(specs, build_optimizer(run, specs), run.mesh.rules(), run.train.seed)

    def set_infinite(path, leaf: jax.Array) -> jax.Array:
        if path_name(path) != "embed.table":
            return leaf
        values = np.array(leaf)
        values[tokens] = np.inf
        return jax.device_put(values, leaf.sharding)

    state = dataclasses.replace(state, model=jax.tree_util.tree_map_with_path(set_infinite, state.model))
    with Checkpointer(run_dir / "checkpoints") as checkpoints:
        checkpoints.save(0, state, data={}, meta={"config_hash": config_hash(run), "tokens": 0})
    (run_dir / "config.yaml").write_text(to_yaml(run))


def poison_letter(run: RunConfig, run_dir: pathlib.Path) -> None:
    poison(run, run_dir, run.data.tokenizer.encode(POISON))


def digests(run_dir: pathlib.Path, step: int, *, without: tuple[str, ...] = ()) -> dict[str, str]:
    leaves = read_leaves(run_dir / "checkpoints", step)
    return {path: leaf.digest for path, leaf in leaves.items() if not path.startswith(without)}


def skipped(run_dir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "logs" / "skipped.jsonl").read_text().splitlines()]


def once(condition: Callable[[], bool], act: Callable[[], None]) -> threading.Thread:
    """Act from another thread as soon as a condition holds."""

    def watch() -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                if condition():
                    return act()
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def logged(run_dir: pathlib.Path, step: int) -> Callable[[], bool]:
    return lambda: any(row["step"] >= step and "train/loss" in row for row in rows(run_dir))


def ask_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_poisoned_batch_changes_no_bit(tmp_path):
    run = config(documents(tmp_path / "text.jsonl", {3}), steps=3, every=1)
    poison_letter(run, tmp_path / "run")
    train(run, tmp_path / "run")
    before, after = (digests(tmp_path / "run", step) for step in (2, 3))
    changed = {path for path in before if before[path] != after[path]}
    assert changed == {"step", "guard/consecutive", "guard/skipped"}


def test_skipped_steps_are_counted_and_their_documents_named(tmp_path):
    run = config(documents(tmp_path / "text.jsonl", {3, 4, 7}))
    poison_letter(run, tmp_path / "run")
    train(run, tmp_path / "run")
    found = {row["step"]: row for row in rows(tmp_path / "run") if "train/loss" in row}
    assert [step for step, row in found.items() if row["train/loss"] is None] == [3, 4, 7]
    assert found[STEPS]["guard/skipped_steps"] == 3
    # The schedule waits for a skipped step.
    rates = [found[step]["train/learning_rate"] for step in (3, 4, 5, 6)]
    assert rates[0] == rates[1] == rates[2] < rates[3]
    named = skipped(tmp_path / "run")
    assert [row["step"] for row in named] == [3, 4, 7]
    assert named[0]["rows"] == [2 * ROWS, 3 * ROWS - 1]
    assert named[0]["reason"] == "train/loss is nan"
    documents_of_7 = {part["document"] for part in named[2]["documents"]}
    assert len(documents_of_7) == 1
    assert "text.jsonl" in documents_of_7.pop()
    # Within a row of skips nothing is saved: the way back stays open.
    assert 4 not in committed_steps(tmp_path / "run" / "checkpoints")


def test_a_rollback_leaves_the_span_out_and_every_resume_takes_the_same_course(tmp_path):
    run = config(documents(tmp_path / "text.jsonl", {6, 7, 8}), guard=GuardConfig(max_consecutive_skips=3))
    run_dir = tmp_path / "run"
    poison_letter(run, run_dir)
    train(run, run_dir)
    whole, course = digests(run_dir, STEPS), losses(run_dir)
    assert sorted(course) == list(range(1, STEPS + 1))
    assert all(course.values())
    record = read_record(step_path(run_dir / "checkpoints", STEPS))
    assert record.meta["rollbacks"] == [[8, 4, 6]]
    assert record.data["rows"] == (STEPS + 8 - 4) * ROWS
    (event,) = [row for row in rows(run_dir) if row.get("kind") == "rollback"]
    assert (event["step"], event["from_step"], event["first_skipped"]) == (4, 8, 6)
    spent = Account()
    for line in (run_dir / "logs" / "goodput.jsonl").read_text().splitlines():
        spent.add(json.loads(line))
    assert spent.seconds["rolled_back"] > 0
    assert spent.seconds["skipped"] > 0
    assert "went back from step 8 to step 4" in write_report(run_dir).read_text()
    for kept in (10, 4):  # from behind the rollback, and from where it is still to come
        for step in committed_steps(run_dir / "checkpoints"):
            if step > kept:
                shutil.rmtree(run_dir / "checkpoints" / str(step))
        train(run, run_dir)
        assert digests(run_dir, STEPS) == whole
        assert losses(run_dir) == course


def test_a_model_that_stays_broken_ends_the_run_in_words(tmp_path):
    run = config(documents(tmp_path / "text.jsonl", set()), guard=GuardConfig(max_consecutive_skips=2, max_rollbacks=1))
    poison(run, tmp_path / "run", list(range(run.model.vocab_size)))
    with pytest.raises(RunFailed, match=r"steps 1 to 2 were skipped, 2 in a row, after 1 rollbacks .*skipped\.jsonl"):
        train(run, tmp_path / "run")
    assert committed_steps(tmp_path / "run" / "checkpoints") == [0]
    assert [row["rows"][0] // ROWS for row in skipped(tmp_path / "run")] == [0, 1, 2, 3]


def test_from_the_seed_a_run_goes_back_to_its_start(tmp_path):
    """The learning rate throws the parameters beyond float32 in the first step; every later loss is not finite."""
    guard = GuardConfig(max_consecutive_skips=2, max_rollbacks=1)
    run = config(documents(tmp_path / "text.jsonl", set()), guard=guard).model_copy(
        update={"optimizer": AdamW(learning_rate=1e38), "schedule": WarmupCosine(warmup_steps=0)}
    )
    with pytest.raises(RunFailed, match="steps 2 to 3 were skipped"):
        train(run, tmp_path / "run")
    (event,) = [row for row in rows(tmp_path / "run") if row.get("kind") == "rollback"]
    assert event["step"] == 0


def test_a_spike_is_skipped(tmp_path):
    """Documents of one letter, learned in a few steps, and one of letters that the model has never seen."""
    texts = ["a" * (ROWS * LENGTH - 1) for _ in range(40)]
    texts[29] = "".join(chr(ord("A") + index % 26) for index in range(ROWS * LENGTH - 1))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    guard = GuardConfig(spike_sigmas=6.0, window=8)
    train(config(JsonLines(paths=(str(tmp_path / "text.jsonl"),)), steps=32, guard=guard), tmp_path / "run")
    (named,) = skipped(tmp_path / "run")
    assert named["step"] == 30
    assert "above its limit of" in named["reason"]


def test_where_nothing_may_be_skipped_the_first_ends_the_run(tmp_path):
    run = config(documents(tmp_path / "text.jsonl", {3}), guard=GuardConfig(max_consecutive_skips=0))
    poison_letter(run, tmp_path / "run")
    with pytest.raises(RunFailed, match="train/loss is nan at step 3"):
        train(run, tmp_path / "run")
    assert committed_steps(tmp_path / "run" / "checkpoints") == [0, 2]


def test_a_step_done_twice_is_the_same_and_changes_nothing(tmp_path, capsys):
    source = documents(tmp_path / "text.jsonl", set())
    for name, every in (("plain", None), ("checked", 3)):
        train(config(source, steps=6, check_every_steps=every), tmp_path / name)
    assert "step 6 was done twice: bit for bit the same" in capsys.readouterr().out
    assert digests(tmp_path / "plain", 6) == digests(tmp_path / "checked", 6)


def test_a_run_goes_on_in_another_dtype_when_asked(tmp_path, capsys):
    run, run_dir = config(documents(tmp_path / "text.jsonl", set()), steps=4), tmp_path / "run"
    train(run, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "4")
    other = run.replace(train=run.train.replace(compute_dtype="bfloat16"))
    asked = other.replace(checkpoint=run.checkpoint.replace(change_dtype=True))
    with pytest.raises(UserError, match=r"float32' -> 'bfloat16' \(accepted with checkpoint\.change_dtype=true\)"):
        train(other, run_dir)
    train(asked, run_dir)
    assert "resuming after step 2" in capsys.readouterr().out
    assert sorted(losses(run_dir)) == [1, 2, 3, 4]
    assert read_meta(run_dir / "checkpoints", 4)["config_hash"] == config_hash(other) != config_hash(run)
    assert "compute_dtype: 'float32' -> 'bfloat16'" in (run_dir / "logs" / "config_changes.txt").read_text()
    train(other, run_dir)  # from here on the run is of this type, without asking
    with pytest.raises(UserError, match="was started with another config"):
        train(run, run_dir)


def test_arrays_of_another_dtype_are_taken_when_asked(tmp_path):
    run, run_dir = config(documents(tmp_path / "text.jsonl", set()), steps=1), tmp_path / "run"
    specs = describe_model(run)
    state = create_state(specs, build_optimizer(run, specs), run.mesh.rules(), run.train.seed)
    rounded = jax.tree.map(lambda leaf: jax.device_put(leaf.astype("bfloat16"), leaf.sharding), state.model)
    with Checkpointer(run_dir / "checkpoints") as checkpoints:
        meta = {"config_hash": config_hash(run), "tokens": 0}
        checkpoints.save(0, dataclasses.replace(state, model=rounded), data={}, meta=meta)
    (run_dir / "config.yaml").write_text(to_yaml(run))
    with pytest.raises(UserError, match=r"embed/table.* checkpoint bfloat16.*, wanted float32"):
        train(run, run_dir)
    train(run.replace(checkpoint=run.checkpoint.replace(change_dtype=True)), run_dir)
    assert read_leaves(run_dir / "checkpoints", 1)["model/embed/table/value"].dtype == "float32"


def test_a_request_in_an_evaluation_saves_and_the_resume_does_it_over(tmp_path):
    held_out = EvalConfig(every_steps=4, max_rows=3000)
    run = config(SyntheticText(num_documents=400), steps=6, evaluation=held_out)
    run_dir = tmp_path / "run"
    asking = once(logged(run_dir, 4), ask_to_stop)
    with pytest.raises(Preempted, match="SIGTERM: saved step 4 in"):
        train(run, run_dir)
    asking.join()
    assert read_meta(run_dir / "checkpoints", 4)["evaluation_due"] is True
    assert not any("eval/loss" in row for row in rows(run_dir))
    train(run, run_dir)
    assert [row["step"] for row in rows(run_dir) if "eval/loss" in row] == [4, 6]
    assert read_meta(run_dir / "checkpoints", 6)["evaluation_due"] is False


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")  # of writes that outlive their save
def test_a_disk_that_fills_up_costs_checkpoints_and_nothing_else(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mlt.train.saving.SAVE_RETRY_SECONDS", (0.2, 0.4))
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", place], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("no right to mount a file system here")
    try:
        run_dir, filler = place / "run", place / "filler"
        checkpoints = run_dir / "checkpoints"
        run = config(documents(tmp_path / "text.jsonl", set()), steps=50, every=10)

        def fill() -> None:
            with filler.open("wb", buffering=0) as file:
                for size in (2**20, 2**12, 1):
                    with contextlib.suppress(OSError):
                        while file.write(b"x" * size):
                            pass

        filling = once(lambda: 20 in committed_steps(checkpoints), fill)
        with pytest.raises(RunFailed, match=r"step 50 could not be saved in 3 attempts.*[Nn]o space"):
            train(run, run_dir)
        filling.join()
        intact = committed_steps(checkpoints)
        assert intact[:2] == [10, 20]
        written = capsys.readouterr()
        assert "warning: could not write checkpoint" in written.out
        assert "Traceback" not in written.out + written.err
        filler.unlink()
        train(run, run_dir)
        assert sorted(losses(run_dir)) == list(range(1, 51))
        assert committed_steps(checkpoints) == sorted({*intact, 30, 40, 50})
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def test_a_request_while_the_step_is_compiled_waits_for_no_compiler(mlt, tmp_path):
    variables = {"JAX_ENABLE_COMPILATION_CACHE": "false", "PYTHONUNBUFFERED": 1}
    process = mlt.start("train", TINY, "--run-dir", tmp_path / "run", **variables)
    try:
        for line in process.stdout:
            if "compiling" in line:
                break
        asked = time.monotonic()
        process.send_signal(signal.SIGUSR1)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 75, output
        assert "SIGUSR1: while the train step was compiled" in output
        assert time.monotonic() - asked < 3
        assert committed_steps(tmp_path / "run" / "checkpoints") == []
    finally:
        process.kill()
