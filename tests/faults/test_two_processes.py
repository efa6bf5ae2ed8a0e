"""Two processes over gloo train as one process with two devices does, stop together, and do not outlive each other."""

import json
import pathlib
import signal
import time

import numpy as np
import pytest
from fault_tools import losses, rows, wait_for_step
from two_tools import endings, free_address, of_two, script, start_one, start_two

from mlt.checkpoint.layout import committed_steps, read_record, step_path
from mlt.nn.param import named_leaves
from mlt.train.load import load_model

LAST = 40


@pytest.fixture(scope="module")
def whole(mlt, tmp_path_factory):
    """An uninterrupted run of one process with two devices."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    ((code, output),) = endings([start_one(mlt, run_dir)])
    assert code == 0, output
    return run_dir


@pytest.fixture(scope="module")
def story(mlt, tmp_path_factory):
    """One run with everything that may befall it, in one directory; what each part of it left behind.

    Two processes until one is asked to stop; one process until it is; two until the second dies; two until the first
    dies; one to the end.
    """
    run_dir = tmp_path_factory.mktemp("story") / "run"
    told = {"run_dir": run_dir}

    two = start_two(mlt, run_dir)
    wait_for_step(run_dir, 3, two[0])
    two[1].signal(signal.SIGTERM)
    told["stopped"] = endings(two)
    told["saved"] = committed_steps(run_dir / "checkpoints")

    one = start_one(mlt, run_dir)
    wait_for_step(run_dir, told["saved"][-1] + 3, one)
    one.signal(signal.SIGTERM)
    told["alone"] = endings([one])

    for name, dies, step in (("second_dies", 1, 13), ("first_dies", 0, 17)):
        two = start_two(mlt, run_dir)
        wait_for_step(run_dir, step, two[0])
        two[dies].kill()
        killed = time.monotonic()
        two[1 - dies].wait(timeout=60)
        told[name + "_after"] = time.monotonic() - killed
        told[name] = endings(two)
    told["end"] = endings([start_one(mlt, run_dir)])
    return told


def test_the_stream_and_the_start_are_the_same_to_the_bit(mlt):
    path, address = pathlib.Path(__file__).parent / "show_batches.py", free_address()
    one = endings([script(mlt, path, {"JAX_NUM_CPU_DEVICES": 2})])
    two = endings([script(mlt, path, {**of_two(index, address), "JAX_NUM_CPU_DEVICES": 1}) for index in (0, 1)])
    shown = [[line for line in output.splitlines() if line.startswith(("batch", "state"))] for _, output in one + two]
    assert [code for code, _ in one + two] == [0, 0, 0], [output for _, output in one + two]
    assert len(set(shown[0])) == 6
    assert shown[0] == shown[1] == shown[2]
    assert "rows 4" in one[0][1]
    assert all("rows 2" in output for _, output in two)


def test_a_signal_to_one_stops_both_at_the_same_step(story):
    assert [code for code, _ in story["stopped"]] == [75, 75], story["stopped"]
    step = story["saved"][-1]
    for _, output in story["stopped"]:
        assert f"SIGTERM: saved step {step} in" in output
        assert "Traceback" not in output
    assert max(row["step"] for row in rows(story["run_dir"])) == LAST


def test_checkpoints_pass_between_one_and_two_processes(story):
    saved = story["saved"][-1]
    (code, output), *_ = story["alone"]
    assert code == 75, output
    assert f"resuming after step {saved}" in output
    assert "resuming after step" in story["second_dies"][0][1]
    ((code, output),) = story["end"]
    assert code == 0, output


@pytest.mark.parametrize(("part", "dies"), [("second_dies", 1), ("first_dies", 0)])
def test_when_one_is_killed_the_other_names_it_and_ends(story, part, dies):
    code, output = story[part][1 - dies]
    assert code == 70, output
    assert f"lost process {dies} of 2" in output
    assert "the same command on all machines resumes" in output
    assert story[part + "_after"] < 20


def test_the_whole_story_equals_an_uninterrupted_run(story, whole):
    found, expected = losses(story["run_dir"]), losses(whole)
    assert found.keys() == expected.keys() == set(range(1, LAST + 1))
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-6)
    positions = [read_record(step_path(run_dir / "checkpoints", LAST)).data for run_dir in (story["run_dir"], whole)]
    assert positions[0] == positions[1]
    trees = [dict(named_leaves(load_model(run_dir)[1])) for run_dir in (story["run_dir"], whole)]
    for name, value in trees[1].items():
        np.testing.assert_allclose(trees[0][name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_only_the_first_process_writes_metrics(story):
    starts = [row for row in rows(story["run_dir"]) if row.get("kind") == "start"]
    assert [row["num_processes"] for row in starts] == [2, 1, 2, 2, 1]
    log = (story["run_dir"] / "logs" / "process-1.log").read_text()
    assert f"step 3/{LAST}" in log
    assert not (story["run_dir"] / "logs" / "process-0.log").exists()
    assert all(json.loads(line) for line in (story["run_dir"] / "metrics.jsonl").read_text().splitlines())


def test_half_set_variables_are_refused(mlt, tmp_path):
    process = mlt.start("train", "absent.py", "--run-dir", tmp_path / "run", MLT_COORDINATOR="127.0.0.1:8476")
    ((code, output),) = endings([process])
    assert code == 2, output
    assert "MLT_NUM_PROCESSES" in output
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


def test_what_the_first_process_refuses_ends_both(mlt, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("not a run")
    for code, output in endings(start_two(mlt, tmp_path / "run")):
        assert code == 2, output
        assert "is not a run directory" in output
        assert "Traceback" not in output
