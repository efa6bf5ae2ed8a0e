"""A run that was killed or asked to stop goes on to the very same losses and parameters."""

import signal

import numpy as np
import pytest
from fault_tools import TINY, losses, wait_for_step

from mlt.nn.param import named_leaves
from mlt.train.load import load_model


def parameters(run_dir) -> dict[str, np.ndarray]:
    _, model, _ = load_model(run_dir)
    return {name: np.asarray(leaf) for name, leaf in named_leaves(model)}


@pytest.fixture(scope="module")
def whole(mlt, tmp_path_factory):
    """An uninterrupted run: (losses, parameters)."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    code, output = mlt("train", TINY, "--run-dir", run_dir)
    assert code == 0, output
    for name in ("config.yaml", "plan.txt", "metrics.jsonl", "report.html", "checkpoints"):
        assert (run_dir / name).exists(), name
    return losses(run_dir), parameters(run_dir)


def assert_equal_to(whole, run_dir):
    expected_losses, expected_parameters = whole
    assert losses(run_dir) == expected_losses
    found = parameters(run_dir)
    assert found.keys() == expected_parameters.keys()
    for name, value in expected_parameters.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("step", [1, 9])
def test_kill_9_and_the_same_command_again(mlt, whole, tmp_path, step):
    run_dir = tmp_path / "run"
    process = mlt.start("train", TINY, "--run-dir", run_dir)
    wait_for_step(run_dir, step, process)
    process.kill()
    process.wait()
    code, output = mlt("train", TINY, "--run-dir", run_dir)
    assert code == 0, output
    assert_equal_to(whole, run_dir)


@pytest.mark.parametrize("number", [signal.SIGTERM])  # others are among the trials of the fault suite
def test_a_request_to_stop_saves_and_asks_to_be_requeued(mlt, whole, tmp_path, number):
    run_dir = tmp_path / "run"
    process = mlt.start("train", TINY, "--run-dir", run_dir)
    wait_for_step(run_dir, 3, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert "the same command resumes" in output
    code, output = mlt("train", TINY, "--run-dir", run_dir)
    assert code == 0, output
    assert "resuming after step" in output
    assert_equal_to(whole, run_dir)


def test_a_complete_run_says_so(mlt, tmp_path):
    run_dir = tmp_path / "run"
    for _ in range(2):
        code, output = mlt("train", TINY, "--run-dir", run_dir, "--arg", "steps=2", "--arg", "plain=true", "--arg", "width=16")
        assert code == 0, output
    assert "complete" in output
    assert len(losses(run_dir)) == 2
