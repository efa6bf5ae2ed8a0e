"""The runs that a command line makes: names, arguments, seeds, and folders of one name."""

import pathlib

import pytest

from mlt.compare.planned import planned_runs
from mlt.compare.same import differences, notes
from mlt.config.dump import to_yaml
from mlt.config.load import load_config
from mlt.errors import UserError

SMALL = pathlib.Path(__file__).with_name("small.py")
TUPLE = "import pathlib\nfrom mlt.config.load import sibling\n\ndef config(widths: tuple[int, ...] = (8,)):\n"
TUPLE += f"    return sibling({str(SMALL)!r}, 'small.py').config(d_ff=sum(widths))\n"


def test_every_combination_is_a_run_named_by_what_varies(tmp_path):
    runs = planned_runs([SMALL], tmp_path, ["d_ff=8,16", "rate=0.1", "steps=3,4"], ["train.z_loss=0.5"], (1, 2))
    assert [run.name for run in runs][:3] == [
        "small-d_ff=8-steps=3-seed=1",
        "small-d_ff=8-steps=3-seed=2",
        "small-d_ff=8-steps=4-seed=1",
    ]
    assert len(runs) == 8
    assert {run.label for run in runs} == {f"small d_ff={width} steps={steps}" for width in (8, 16) for steps in (3, 4)}
    last = runs[-1]
    assert last.paths.path == tmp_path / "small-d_ff=16-steps=4-seed=2"
    assert (last.config.train.seed, last.config.train.steps, last.config.train.z_loss) == (2, 4, 0.5)
    assert last.config.optimizer.learning_rate == 0.1
    assert last.config.model.stack.head[0].mixers[0].d_ff == 16


def test_semicolons_separate_values_with_commas_and_arguments_go_where_they_are_taken(tmp_path):
    other = tmp_path / "other.py"
    other.write_text(TUPLE)
    runs = planned_runs([SMALL, other], tmp_path, ["widths=8,8;16,8", "d_ff=4"], [])
    widths = [run.config.model.stack.head[0].mixers[0].d_ff for run in runs]
    assert [run.name for run in runs] == ["small", "other-widths=8,8", "other-widths=16,8"]
    assert widths == [4, 16, 24]


def test_folders_of_one_name_are_told_apart(tmp_path):
    for parent in ("a", "b"):
        (tmp_path / parent / "run").mkdir(parents=True)
        (tmp_path / parent / "run" / "config.yaml").write_text(to_yaml(load_config(SMALL)))
    first, second = planned_runs([tmp_path / "a" / "run", tmp_path / "b" / "run"], None, [], [])
    assert (first.name, second.name) == (str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run"))
    assert planned_runs([tmp_path / "a" / "run"], None, [], [])[0].name == "run"
    with pytest.raises(UserError, match="both make a run"):
        planned_runs([tmp_path / "a" / "run"] * 2, None, [], [])


def test_what_is_read_must_be_the_same_and_the_rest_is_noted(tmp_path):
    def lines(find, *sets, **options):
        runs = [planned_runs([SMALL], tmp_path, [], list(words))[0] for words in ((), sets)]
        return [line.removeprefix("small: ") for line in find(runs, **options)]

    for words in ("data.seed=1", "evaluation.max_rows=5", "train.seed=1", "data.packing=best_fit", "train.steps=7"):
        assert [line.partition(":")[0] for line in lines(differences, words)] == [words.partition("=")[0]]
        assert lines(notes, words) == []
    assert lines(differences, "train.seed=1", seeds=True) == []
    for words in ("optimizer.learning_rate=0.1", "train.compute_dtype=bfloat16", "mesh.replica=4"):
        assert lines(differences, words) == []
        assert [line.partition(":")[0] for line in lines(notes, words)] == [words.partition("=")[0]]
    for words in ("model.d_model=16", "data.prefetch_batches=1", "log.every_steps=7", "checkpoint.keep=9"):
        assert lines(differences, words) == lines(notes, words) == []
