"""Rules over a whole tree and the report that names all broken ones."""

import pickle
from collections.abc import Iterator, Mapping

import pytest

from mlt.config.base import Config
from mlt.config.problems import ABSENT, ConfigError, Problem, at, check_tree, collect_problems, join, shorten, suggest, walk
from mlt.errors import UserError


class Heads(Config):
    num_heads: int
    num_kv_heads: int

    def problems(self) -> Iterator[Problem]:
        if self.num_heads % self.num_kv_heads:
            rule = f"must divide num_heads = {self.num_heads}"
            yield Problem("num_kv_heads", self.num_kv_heads, rule, "use 1, 2, 4 or 8")


class Block(Config):
    mixer: Heads
    name: str = "b"


class Model(Config):
    d_model: int
    blocks: tuple[Block, ...] = ()
    named: Mapping[str, Block] = {}

    def problems(self) -> Iterator[Problem]:
        if self.d_model % 8:
            yield Problem("d_model", self.d_model, "must be a multiple of 8")
        if not self.blocks:
            yield Problem("", ABSENT, "has no blocks")


class Run(Config):
    model: Model

    def problems(self) -> Iterator[Problem]:
        for index, block in enumerate(self.model.blocks):
            if block.name == "bad":
                yield Problem(f"model.blocks[{index}].name", block.name, "is taken")


GOOD, BAD = Block(mixer=Heads(num_heads=8, num_kv_heads=2)), Block(mixer=Heads(num_heads=8, num_kv_heads=3))
CRASHES = Block(mixer=Heads(num_heads=8, num_kv_heads=0))


def test_one_report_names_all_problems_in_tree_order() -> None:
    run = Run(model=Model(d_model=7, blocks=(GOOD, BAD, BAD.replace(name="bad")), named={"x": GOOD, "y z": BAD}))
    with pytest.raises(ConfigError) as caught:
        check_tree(run, "configs/tiny.py")
    assert str(caught.value) == (
        "5 config problems in configs/tiny.py:\n"
        "  1. model.blocks[2].name = 'bad': is taken\n"
        "  2. model.d_model = 7: must be a multiple of 8\n"
        "  3. model.blocks[1].mixer.num_kv_heads = 3: must divide num_heads = 8; use 1, 2, 4 or 8\n"
        "  4. model.blocks[2].mixer.num_kv_heads = 3: must divide num_heads = 8; use 1, 2, 4 or 8\n"
        '  5. model.named["y z"].mixer.num_kv_heads = 3: must divide num_heads = 8; use 1, 2, 4 or 8'
    )
    assert isinstance(caught.value, UserError)


def test_a_sound_tree_passes() -> None:
    check_tree(Run(model=Model(d_model=8, blocks=(GOOD,))))
    assert collect_problems(Run(model=Model(d_model=8, blocks=(GOOD,)))) == []


def test_a_problem_of_the_whole_node_carries_the_path_of_the_node() -> None:
    assert [str(problem) for problem in collect_problems(Run(model=Model(d_model=8)))] == ["model: has no blocks"]
    assert [str(problem) for problem in collect_problems(Model(d_model=8))] == ["config: has no blocks"]


def test_collection_may_start_inside_a_tree() -> None:
    (problem,) = collect_problems((GOOD, BAD), "model.blocks")
    assert problem.path == "model.blocks[1].mixer.num_kv_heads"


def test_a_crashing_rule_is_a_consequence_only_beside_real_problems() -> None:
    (problem,) = collect_problems(Model(d_model=7, blocks=(CRASHES, GOOD)))
    assert problem.path == "d_model"
    with pytest.raises(ZeroDivisionError):
        collect_problems(Model(d_model=8, blocks=(CRASHES, GOOD)))


def test_walk_visits_every_node_once() -> None:
    run = Run(model=Model(d_model=8, blocks=(GOOD,), named={"x": BAD}))
    assert [path for path, _ in walk(run)] == [
        "",
        "model",
        "model.blocks[0]",
        "model.blocks[0].mixer",
        "model.named.x",
        "model.named.x.mixer",
    ]


def test_paths() -> None:
    assert join("a.b", "c[0].d") == "a.b.c[0].d"
    assert join("a", "[0]") == "a[0]"
    assert (join("", "a"), join("a", "")) == ("a", "a")
    assert at(at(at("", "a"), 2), "b-c") == "a[2].b-c"
    assert at("a", 'x."y') == 'a["x.\\"y"]'
    assert Problem("b", 1, "no").under("a") == Problem("a.b", 1, "no")


def test_long_values_are_cut_and_kept_on_one_line() -> None:
    shown = str(Problem("a", ["line\n" * 50], "no"))
    assert len(shown) < 100
    assert "\n" not in shown
    assert shown.endswith("...: no")
    assert shorten("x" * 10) == repr("x" * 10)


def test_suggestions() -> None:
    options = ["num_heads", "head_dim", "window"]
    assert suggest("num_haeds", options) == "did you mean num_heads?"
    assert suggest("dim_head", options) == "did you mean head_dim?"
    assert suggest("WINDOW", options) == "did you mean window?"
    assert suggest("qqq", options) == "valid keys: num_heads, head_dim, window"
    assert suggest("windw", options, choices="it has", list_all=True) == (
        "did you mean window? it has: num_heads, head_dim, window"
    )
    assert suggest("x", []) == "valid keys: none"


def test_a_report_survives_pickle() -> None:
    error = ConfigError([Problem("a", 1, "no", "yes")], "f.py")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "1 config problem in f.py:\n  1. a = 1: no; yes"
