"""Tables in the memory of two hosts: two processes, each with its part, train as one does, and take over from each other."""

import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
from fault_tools import losses, rows
from two_tools import endings, start_one, start_two

from mlt.checkpoint.layout import committed_steps, read_leaves
from mlt.checkpoint.restore import restore
from mlt.config.load import load_config
from mlt.nn.param import named_leaves
from mlt.parallel.mesh import Layout
from mlt.train.setup import build_optimizer, describe_model
from mlt.train.state import abstract_state

TABLES = pathlib.Path(__file__).parent / "tiny_tables.py"
WORDS = ("--set", "mesh.fsdp=2", "--set", "train.peer_timeout_seconds=20")
LAST = 8
FULL = bool(os.environ.get("MLT_FULL"))


@pytest.fixture(scope="module")
def runs(mlt, tmp_path_factory):
    """Run directories of one and of two processes, and of runs that the other went on with after step 4."""
    folder = tmp_path_factory.mktemp("tables")
    found = {}

    def whole(name: str, start, source: str | None = None, words: tuple[str, ...] = WORDS) -> None:
        found[name] = folder / name
        if source is not None:
            shutil.copytree(found[source], found[name])
            shutil.rmtree(found[name] / "checkpoints" / str(LAST))
        started = start(mlt, found[name], config=TABLES, words=words)
        for code, output in endings(started if isinstance(started, list) else [started]):
            assert code == 0, output

    whole("one", start_one)
    whole("two", start_two)
    whole("two, then one", start_one, "two")
    if FULL:
        whole("one, then two", start_two, "one")
        # Each holds the whole table, and both update it.
        whole("copies", start_two, words=("--set", "mesh.replica=2", *WORDS[2:]))
    return found


def test_two_processes_train_as_one_and_take_over_from_each_other(runs):
    expected = losses(runs["one"])
    assert set(expected) == set(range(1, LAST + 1))
    held_out = [row["eval/loss"] for row in rows(runs["one"]) if "eval/loss" in row]
    assert len(held_out) == 2
    states = {name: state_of(path) for name, path in runs.items()}
    for name, path in runs.items():
        assert committed_steps(path / "checkpoints") == [4, LAST]
        np.testing.assert_allclose([losses(path)[step] for step in expected], list(expected.values()), rtol=1e-6, err_msg=name)
        np.testing.assert_allclose([row["eval/loss"] for row in rows(path) if "eval/loss" in row], held_out, rtol=1e-6)
        for array, value in states["one"].items():
            np.testing.assert_allclose(states[name][array], value, rtol=1e-5, atol=2e-6, err_msg=f"{name} {array}")
    tables = {name: value for name, value in states["two"].items() if name.endswith("mixer.table")}
    # The parameter, and in the optimizer's state two moments and a count.
    assert sorted(value.shape for value in tables.values()) == [(4096,), (4096, 8), (4096, 8), (4096, 8)]
    assert all((value != 0).any() for value in tables.values())


@pytest.mark.skipif(not FULL, reason="half a minute; MLT_FULL=1 runs it")
def test_a_resume_by_as_many_processes_has_the_same_bits(mlt, runs, tmp_path):
    shutil.copytree(runs["two"], tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / str(LAST))
    (code, output), (other, _) = endings(start_two(mlt, tmp_path / "again", config=TABLES, words=WORDS))
    assert (code, other) == (0, 0), output
    assert "resuming after step 4" in output
    folders = [path / "checkpoints" for path in (tmp_path / "again", runs["two"])]
    assert read_leaves(folders[0], LAST) == read_leaves(folders[1], LAST)


def test_the_plan_of_two_processes_gives_each_its_part(runs):
    plans = {name: (runs[name] / "plan.txt").read_text() for name in ("one", "two")}
    # 4,096 rows of 8 values, two moments and a count; half of them on each of two hosts.
    whole = 4 * 4096 * (8 + 8 + 8 + 1) / 2**20
    assert f"host memory  {whole:.1f} MiB of each process" in plans["one"]
    assert (
        f"host memory  {whole / 2:.1f} MiB of each process for tables and their optimizers' state, over 2 hosts" in plans["two"]
    )
    start = json.loads((runs["two"] / "metrics.jsonl").read_text().splitlines()[0])
    assert start["num_processes"] == 2


def state_of(run_dir: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of the last checkpoint, tables whole: it is that of a table on the device."""
    config = load_config(TABLES)
    specs, rules = describe_model(config), Layout().rules(jax.devices()[:1])
    state = restore(run_dir / "checkpoints", abstract_state(specs, build_optimizer(config, specs), rules), step=LAST).state
    return {name: np.asarray(leaf) for name, leaf in named_leaves((state.model, state.optimizer))}
