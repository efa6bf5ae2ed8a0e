"""When a run is started again, and how often."""

import pytest

from mlt.launch.restarts import combined, decide, main

LIMITS = {"max_restarts": 100, "max_losses": 3}


def checkpoint(run_dir, step):
    (run_dir / "checkpoints" / str(step)).mkdir(parents=True)
    (run_dir / "checkpoints" / f"{step + 1}.orbax-checkpoint-tmp-0").mkdir()


@pytest.mark.parametrize(("code", "again"), [(0, False), (1, False), (2, False), (70, True), (75, True), (137, True), (-9, True)])
def test_only_lost_and_saved_runs_start_again(tmp_path, code, again):
    assert decide(tmp_path, code, restarts=0, **LIMITS).again is again


def test_losses_without_a_newer_checkpoint_are_bounded(tmp_path):
    checkpoint(tmp_path, 8)
    assert [decide(tmp_path, 70, restarts=n, **LIMITS).again for n in range(4)] == [True, True, True, False]
    checkpoint(tmp_path, 12)
    decision = decide(tmp_path, 70, restarts=4, **LIMITS)
    assert decision.again
    assert "the first time with no checkpoint newer than that of step 12" in decision.text


def test_saved_runs_do_not_count_as_lost(tmp_path):
    for restarts in range(20):
        assert decide(tmp_path, 75, restarts=restarts, **LIMITS).again
    assert not decide(tmp_path, 75, restarts=100, **LIMITS).again
    assert decide(tmp_path, 70, restarts=3, **LIMITS).again


def test_a_damaged_count_starts_anew(tmp_path):
    decide(tmp_path, 70, restarts=0, **LIMITS)
    (tmp_path / "logs" / "launch" / "losses.json").write_text("{")
    assert "first time" in decide(tmp_path, 70, restarts=1, **LIMITS).text


def test_a_count_that_cannot_be_written_keeps_no_run_from_starting_again(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "launch").write_text("where the folder should be")
    decision = decide(tmp_path, 70, restarts=0, **LIMITS)
    assert decision.again
    assert "losses.json cannot be written" in decision.text
    assert not decide(tmp_path, 70, restarts=100, **LIMITS).again


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([0, 0], 0),
        ([75, 75], 75),
        ([70, 2], 2),
        ([70, 1, 70], 1),
        ([-9, 70], 70),
        ([75, 70], 70),
        ([75, 0], 75),
        ([-11], 70),
        ([3], 3),
    ],
)
def test_the_code_that_decides(codes, code):
    assert combined(codes) == code


def test_the_command_for_job_scripts(tmp_path, capsys):
    words = [str(tmp_path), "--max-restarts=2", "--max-losses=3", "--code=75"]
    assert main([*words, "--restarts=1"]) == 0
    assert main([*words, "--restarts=2"]) == 1
    assert "restart 2\n" in capsys.readouterr().out
