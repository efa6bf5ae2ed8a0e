"""`mlt verify CONFIG --resume`: it holds for a sound run, says where each kill fell, and fails for anything that differs."""

import json
import shutil

import numpy as np
import pytest
from fault_tools import TINY

from mlt.config.load import load_config
from mlt.config.run import RunConfig
from mlt.errors import UserError
from mlt.run_paths import RunPaths
from mlt.verify import resume
from mlt.verify.resume_certificate import Certificate, Finding, Kill
from mlt.verify.resume_child import batches_seen
from mlt.verify.resume_compare import numbers, unequal_arrays

SETS = ("data.sequence_length=32", "data.batch_size=2", "evaluation.max_rows=2")
KILLS = 5


@pytest.fixture(scope="module")
def proof(tmp_path_factory):
    """A certificate with one kill at each moment, and the runs it was made of."""
    place = tmp_path_factory.mktemp("certificate")
    config = load_config(TINY, args=("plain=true", "width=16"), sets=SETS, root=RunConfig)
    short, at = resume.shortened(config, 8)
    made = resume._Proof(short, resume.Options(steps=8, kills=KILLS, processes=1, name="tiny"), at, place, lambda text: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiles in less time
        try:
            made.run()
        finally:
            made.stop()
    return made


def test_it_holds(proof):
    certificate = proof.certificate
    assert certificate.holds, certificate.text()
    assert [kill.where for kill in certificate.kills] == list(resume.MOMENTS)
    assert all(kill.hit and kill.exit_code == -9 for kill in certificate.kills)
    after = [kill.resumed_from for kill in certificate.kills if kill.resumed_from is not None]
    assert len(after) == KILLS
    assert max(after) > 0
    compared = {found.what.partition(": ")[2] for found in certificate.findings}
    assert {"parameters", "optimizer state", "random key", "data position", "batches", "metrics", "losses"} <= compared


def test_it_is_written(proof, tmp_path):
    proof.certificate.write(tmp_path)
    written = json.loads((tmp_path / "certificate.json").read_text())
    assert written["holds"] is True
    assert written["config_hash"] == proof.certificate.config_hash
    assert len(written["kills"]) == KILLS
    assert written["versions"]["jax"]
    assert "resume HOLDS: tiny, 8 steps, 5 of 5 kills" in (tmp_path / "certificate.txt").read_text()


def _changed_loss(run):
    path = RunPaths(run).metrics_path
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    row = next(row for row in lines if row.get("step") == 5 and "train/loss" in row)
    row["train/loss"] = float(np.nextafter(row["train/loss"], 9.0))
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))


def _another_step(run):
    path = RunPaths(run).checkpoints_path
    shutil.rmtree(path / "8")
    shutil.copytree(path / "6", path / "8")


@pytest.mark.parametrize(
    ("change", "fails"),
    [(_changed_loss, {"metrics"}), (_another_step, {"parameters", "optimizer state", "all other state", "data position"})],
)
def test_a_difference_is_found(proof, monkeypatch, change, fails):
    run = proof.place / f"changed-{change.__name__}"
    shutil.copytree(proof.whole, run)
    shutil.copytree(proof.runs.notes(proof.whole), proof.runs.notes(run))
    change(run)
    monkeypatch.setattr(proof, "certificate", Certificate("tiny", "", 8))
    proof._compare(run)
    assert {found.what.partition(": ")[2] for found in proof.certificate.findings if not found.holds} == fails


def test_a_batch_that_is_read_twice_must_be_the_same(proof, tmp_path):
    notes = tmp_path / "notes"
    shutil.copytree(proof.runs.notes(proof.whole), notes)
    first = json.loads(next(notes.glob("*.jsonl")).read_text().splitlines()[0])
    first["rows"]["0"] = f"{1:016x}"
    (notes / "0.jsonl").write_text(json.dumps(first) + '\n{"tokens": 99, "ro')
    with pytest.raises(ValueError, match="row 0 of the batch at token 0 was read twice"):
        batches_seen(notes)


def test_one_bit_is_a_difference():
    left = {"a": np.zeros(3, np.float32), "b": np.ones(2)}
    assert unequal_arrays(left, {"a": np.zeros(3, np.float32), "b": np.ones(2)}) == []
    assert unequal_arrays(left, {"a": -np.zeros(3, np.float32), "c": np.ones(2)}) == ["a", "b", "c"]
    assert unequal_arrays(left, {"a": np.zeros(3), "b": np.ones(2)}) == ["a"]


def test_a_step_logged_twice_must_be_the_same(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n{"step": 1, "train/loss": 2.5}\n')
    with pytest.raises(ValueError, match=r"train/loss of step 1 was logged twice: 2\.0 and 2\.5"):
        numbers(tmp_path)


def test_a_kill_that_was_never_made_proves_nothing():
    certificate = Certificate("tiny", "", 8, findings=[Finding("metrics", True, "")])
    assert certificate.holds
    certificate.kills.append(Kill("in evaluation", "SIGTERM", misses=5))
    assert not certificate.holds
    assert "never hit" in certificate.text()


def test_too_few_steps_are_refused(tmp_path):
    config = load_config(TINY, root=RunConfig)
    with pytest.raises(UserError, match="--steps 4: too few"):
        resume.verify_resume(config, resume.Options(steps=4), tmp_path / "out", say=print)
    assert not (tmp_path / "out").exists()
