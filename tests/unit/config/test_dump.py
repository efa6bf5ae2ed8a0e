"""Trees as text and back: nothing lost, nothing guessed, every mistake in a saved config named at once."""

import json
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from pydantic import Field

from mlt.config.base import Config
from mlt.config.build import build
from mlt.config.dump import config_hash, diff, from_yaml, to_plain, to_yaml
from mlt.config.problems import ConfigError, Problem
from mlt.config.text import read_yaml, write_yaml
from mlt.errors import UserError


class Mixer(Config):
    @abstractmethod
    def build(self) -> str: ...


class Attention(Mixer):
    num_heads: int
    num_kv_heads: int | None = None
    window: int | Literal["auto"] | None = None

    def build(self) -> str:
        return "attention"

    def problems(self) -> Iterator[Problem]:
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            yield Problem("num_kv_heads", self.num_kv_heads, f"must divide num_heads = {self.num_heads}")


class Sinks(Attention):
    sinks: int = 4


class Conv(Mixer):
    width: int = 4

    def build(self) -> str:
        return "conv"


class Block(Config):
    name: str
    mixer: Mixer
    extra: Conv | None = None
    others: tuple[Attention | Conv, ...] = ()


class Tree(Config):
    """One field of every kind."""

    blocks: tuple[Block, ...] = ()
    named: Mapping[str, Block | None] = {}
    fixed: tuple[Attention | None, int, str] = (None, 0, "")
    rate: float = 1e-3
    either: int | float | str | bool | None = None
    words: tuple[str, ...] = ()
    grid: tuple[tuple[float, ...], ...] = ()
    bound: float = Field(default=1.0, allow_inf_nan=True)


texts = st.one_of(
    st.text(st.characters(codec="utf-8")),
    st.sampled_from(
        [
            "",
            "no",
            "null",
            "~",
            "1e-3",
            "1_000",
            "0x1F",
            "-.inf",
            "2024-01-01",
            "a: b",
            "# c",
            " x",
            "- y",
            "=",
            "<<",
            "\x85",
            "a\u2028b",
            "a\n b\r",
        ]
    ),
)
numbers = st.floats(allow_nan=False, allow_infinity=False)
attentions = st.builds(
    Attention,
    num_heads=st.integers(),
    num_kv_heads=st.none() | st.integers(),
    window=st.none() | st.just("auto") | st.integers(),
)
sinks = st.builds(Sinks, num_heads=st.integers(), sinks=st.integers())
convs = st.builds(Conv, width=st.integers())
blocks = st.builds(
    Block,
    name=texts,
    mixer=attentions | sinks | convs,
    extra=st.none() | convs,
    others=st.lists(attentions | sinks | convs, max_size=3),
)
trees = st.builds(
    Tree,
    blocks=st.lists(blocks, max_size=3),
    named=st.dictionaries(texts, st.none() | blocks, max_size=2),
    fixed=st.tuples(st.none() | attentions | sinks, st.integers(), texts),
    rate=numbers,
    either=st.none() | st.booleans() | st.integers() | numbers | texts,
    words=st.lists(texts, max_size=4),
    grid=st.lists(st.lists(numbers, max_size=3), max_size=2),
    bound=st.floats(allow_nan=False),
)


def typed(value: Any) -> Any:
    """The value with the type of everything in it, so that 1, 1.0 and True differ, and -0.0 from 0.0."""
    if isinstance(value, Config):
        return type(value), [typed(getattr(value, name)) for name in type(value).model_fields]
    if isinstance(value, tuple):
        return tuple, [typed(item) for item in value]
    if isinstance(value, Mapping):
        return type(value), [(key, typed(item)) for key, item in value.items()]
    return type(value), repr(value)


@settings(max_examples=120, deadline=None)
@given(trees)
def test_a_tree_comes_back_from_yaml_equal_and_of_the_same_types(tree: Tree) -> None:
    back = from_yaml(to_yaml(tree))
    assert back == tree
    assert typed(back) == typed(tree)
    assert hash(back) == hash(tree)
    assert config_hash(back) == config_hash(tree)
    assert diff(back, tree) == []


@settings(max_examples=120, deadline=None)
@given(trees)
def test_plain_data_survives_json(tree: Tree) -> None:
    for all_classes in (False, True):
        assert build(json.loads(json.dumps(to_plain(tree, all_classes=all_classes)))) == tree


def sample() -> Tree:
    return Tree(
        blocks=(
            Block(name="a", mixer=Attention(num_heads=8, num_kv_heads=2), extra=Conv(width=3)),
            Block(name="b", mixer=Conv(), others=(Sinks(num_heads=4),)),
        ),
        rate=1e-5,
        words=("no", "x"),
    )


def test_yaml_is_readable() -> None:
    here = __name__
    assert to_yaml(sample()) == (
        f"class: {here}.Tree\n"
        "blocks:\n"
        "- name: a\n"
        "  mixer:\n"
        f"    class: {here}.Attention\n"
        "    num_heads: 8\n"
        "    num_kv_heads: 2\n"
        "    window: null\n"
        "  extra:\n"
        "    width: 3\n"
        "  others: []\n"
        "- name: b\n"
        "  mixer:\n"
        f"    class: {here}.Conv\n"
        "    width: 4\n"
        "  extra: null\n"
        "  others:\n"
        f"  - class: {here}.Sinks\n"
        "    num_heads: 4\n"
        "    num_kv_heads: null\n"
        "    window: null\n"
        "    sinks: 4\n"
        "named: {}\n"
        "fixed: [null, 0, '']\n"
        "rate: 1e-05\n"
        "either: null\n"
        "words: [no, x]\n"
        "grid: []\n"
        "bound: 1.0\n"
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("-2.5e+10", -2.5e10),
        (".5", 0.5),
        ("3.", 3.0),
        ("1_000", 1000),
        ("1_0.5_0", 10.5),
        ("010", 10),
        ("-.inf", -math.inf),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("None", "None"),
        ("0x10", "0x10"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("1e", "1e"),
        ("_1", "_1"),
        ("'1e-3'", "1e-3"),
        ("[1, a, {b: .1}]", [1, "a", {"b": 0.1}]),
    ],
)
def test_scalars_are_read_by_one_table(text: str, value: Any) -> None:
    read = read_yaml(text)
    assert read == value
    assert type(read) is type(value)
    assert read_yaml(write_yaml({"x": value}))["x"] == value


def test_nan_is_read() -> None:
    assert math.isnan(read_yaml(".nan"))
    assert math.isnan(read_yaml(write_yaml({"x": math.nan}))["x"])


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "key 'a' is given twice"),
        ("a: 1\n  b: 2\n", 2, "mapping values are not allowed"),
        ("a: 1\nb: {c: [1, 2}\n", 2, "expected"),
        ("a: 1\n3: 4\n", 2, "key 3 is no string"),
        ("a: !!python/object:os.system x\n", 1, "could not determine a constructor"),
    ],
)
def test_bad_yaml_names_file_and_line(text: str, line: int, says: str) -> None:
    with pytest.raises(UserError) as caught:
        from_yaml(text, source="run/config.yaml")
    assert str(caught.value).startswith(f"run/config.yaml, line {line}, column ")
    assert says in str(caught.value)


def test_every_mistake_in_a_saved_tree_is_reported_at_once() -> None:
    data = to_plain(sample())
    data["rate"] = "1e-3"
    data["wrods"] = []
    data["blocks"][0]["mixer"].update(num_kv_heads=3)
    data["blocks"][0]["extra"]["width"] = 2.5
    del data["blocks"][1]["name"]
    data["blocks"][1]["mixer"]["class"] = f"{__name__}.Cnov"
    data["blocks"][1]["others"].append(5)
    data["named"] = {"x": {"mixer": {"width": 1}, "name": "x"}}
    with pytest.raises(ConfigError) as caught:
        build(data, source="config.yaml")
    assert caught.value.source == "config.yaml"
    assert [(problem.path, problem.rule, problem.ways_out) for problem in caught.value.problems] == [
        ("wrods", "unknown key of Tree", "did you mean words?"),
        ("rate", "must be a number", "write 1e-3 without quotes"),
        ("blocks[0].extra.width", "must be an integer", None),
        ("blocks[0].mixer.num_kv_heads", "must divide num_heads = 8", None),
        ("blocks[1].name", "is required", "give it a string"),
        ("blocks[1].others[1]", "must be an Attention or a Conv", None),
        (
            "blocks[1].mixer.class",
            f"{__name__} has no config class Cnov",
            "did you mean Conv? it has: Mixer, Attention, Sinks, Conv, Block, Tree",
        ),
        ("named.x.mixer.class", "must name the class of a Mixer", "write `class: mlt.module.ClassName` first"),
    ]


@pytest.mark.parametrize(
    ("name", "rule", "ways_out"),
    [
        ("os.path", "classes load only from mlt", None),
        ("tests.never.loaded.Class", "classes load only from mlt", None),
        ("Attention", "must be the full name of a config class", None),
        (3, "must be the full name of a config class", None),
        ("mlt.config.base.Config", "Config is only a base class", "name one of its subclasses"),
        (f"{__name__}.Mixer", "Mixer is only a base class", "name one of its subclasses"),
        (f"{__name__}.sample", f"{__name__} has no config class sample", "Tree"),
        ("mlt.config.bse.Config", "there is no module mlt.config.bse", "did you mean mlt.config.base?"),
        ("mlt.base.Config", "there is no module mlt.base", "mlt.config.base"),
        ("mlt.config.zzzzzz.Config", "there is no module mlt.config.zzzzzz", "mlt.config has: args, base, build"),
        ("mlt.config.base.Confg", "mlt.config.base has no config class Confg", "did you mean Config?"),
    ],
)
def test_unknown_classes_are_refused_with_near_names(name: Any, rule: str, ways_out: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        build({"class": name})
    (problem,) = caught.value.problems
    assert (problem.path, problem.value) == ("class", name)
    assert problem.rule.startswith(rule)
    assert (problem.ways_out is None) if ways_out is None else (ways_out in (problem.ways_out or ""))


def test_a_class_must_fit_its_field() -> None:
    data = {"class": f"{__name__}.Block", "name": "a", "mixer": {"class": f"{__name__}.Tree"}, "extra": [1]}
    with pytest.raises(ConfigError) as caught:
        build(data)
    assert [(problem.path, problem.rule) for problem in caught.value.problems] == [
        ("extra", "must be a Conv or None"),
        ("mixer.class", "must be a Mixer, but Tree is not one"),
    ]


def test_the_root_can_be_demanded() -> None:
    with pytest.raises(ConfigError, match="must be a Block, but Tree is not one"):
        from_yaml(to_yaml(sample()), root=Block)
    with pytest.raises(ConfigError, match="must be a mapping that describes a Tree"):
        from_yaml("- 1", root=Tree)
    assert from_yaml("rate: 2", root=Tree) == Tree(rate=2)


def test_rules_wait_for_the_check_when_all_else_is_sound() -> None:
    tree = Tree(blocks=(Block(name="a", mixer=Attention(num_heads=8, num_kv_heads=3)),))
    assert from_yaml(to_yaml(tree)) == tree


def test_a_class_that_could_not_be_loaded_back_is_not_saved() -> None:
    class Local(Mixer):
        def build(self) -> str:
            return "local"

    with pytest.raises(ConfigError) as caught:
        to_yaml(Tree(blocks=(Block(name="a", mixer=Local()),)))
    (problem,) = caught.value.problems
    assert problem.path == "blocks[0].mixer"
    assert "loads only top-level classes from mlt" in problem.rule


def test_the_hash_depends_on_every_value_and_class() -> None:
    tree = sample()
    variants = [
        tree.replace(rate=2e-5),
        tree.replace(words=("x", "no")),
        tree.replace(fixed=(None, 1, "")),
        tree.replace(blocks=tree.blocks[:1]),
        tree.replace(blocks=(tree.blocks[0], tree.blocks[1].replace(others=(Attention(num_heads=4),)))),
        tree.replace(either=1),
        tree.replace(either=True),
        tree.replace(either="1"),
    ]
    hashes = {config_hash(variant) for variant in [tree, *variants]}
    assert len(hashes) == len(variants) + 1
    assert all(len(text) == 16 and int(text, 16) >= 0 for text in hashes)
    assert config_hash(sample()) == config_hash(tree)
    swapped = [tree.replace(named=dict(order)) for order in ([("a", None), ("b", None)], [("b", None), ("a", None)])]
    assert config_hash(swapped[0]) == config_hash(swapped[1])


def test_diff_names_every_place() -> None:
    old = sample()
    new = old.replace(
        blocks=(old.blocks[0].replace(mixer=Sinks(num_heads=8, num_kv_heads=2)),), rate=2e-5, named={"k": None}, either=1
    )
    first, *rest = diff(old, new)
    assert first == f"blocks[0].mixer.class: '{__name__}.Attention' -> '{__name__}.Sinks'"
    assert rest[0] == "blocks[0].mixer.sinks: absent -> 4"
    assert rest[1].startswith("blocks[1]: {'name': 'b', ")
    assert rest[1].endswith(" -> absent")
    assert rest[2:] == ["named.k: absent -> None", "rate: 1e-05 -> 2e-05", "either: None -> 1"]


def test_diff_takes_saved_data_that_no_longer_builds() -> None:
    saved = to_plain(sample())
    saved["old_field"] = saved.pop("bound")
    assert diff(saved, sample()) == ["old_field: 1.0 -> absent", "bound: absent -> 1.0"]
    assert diff(Tree(either=1), Tree(either=True)) == ["either: 1 -> True"]
