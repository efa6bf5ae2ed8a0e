"""`--set`: what it reaches, what it refuses, and that it reports everything at once."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from mlt.config.base import Config
from mlt.config.override import apply_sets, parse_path
from mlt.config.problems import ConfigError, Problem, at


class Mixer(Config):
    @abstractmethod
    def build(self) -> str: ...


class Attention(Mixer):
    num_heads: int
    num_kv_heads: int = 1
    window: int | None = None

    def build(self) -> str:
        return "attention"

    def problems(self) -> Iterator[Problem]:
        if self.num_heads % self.num_kv_heads:
            yield Problem("num_kv_heads", self.num_kv_heads, f"must divide num_heads = {self.num_heads}")


class Conv(Mixer):
    width: int = 4

    def build(self) -> str:
        return "conv"


class Block(Config):
    mixer: Mixer
    name: str = "block"


class Model(Config):
    d_model: int
    blocks: tuple[Block, ...]
    extra: Conv | None = None


class Run(Config):
    model: Model
    rate: float = 0.1
    betas: tuple[float, ...] = (0.9, 0.99)
    weights: Mapping[str, float] = {"code": 1.0}


RUN = Run(
    model=Model(
        d_model=64,
        blocks=(Block(mixer=Attention(num_heads=8)), Block(mixer=Conv(), name="conv"), Block(mixer=Attention(num_heads=4))),
    )
)


def refused(*sets: str) -> list[tuple[str, str, str | None]]:
    with pytest.raises(ConfigError) as caught:
        apply_sets(RUN, sets)
    return [(problem.path, problem.rule, problem.ways_out) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("model.d_model=128", lambda run: (run.model.d_model, 128)),
        ("rate=1e-3", lambda run: (run.rate, 1e-3)),
        ("rate=3", lambda run: (run.rate, 3.0)),
        ("model.blocks[0].mixer.window=512", lambda run: (run.model.blocks[0].mixer.window, 512)),
        ("model.blocks.2.mixer.window=5_12", lambda run: (run.model.blocks[2].mixer.window, 512)),
        ("model.blocks[-1].mixer.num_heads=6", lambda run: (run.model.blocks[2].mixer.num_heads, 6)),
        ("model.blocks.-2.mixer.width=3", lambda run: (run.model.blocks[1].mixer.width, 3)),
        ("model.blocks[*].name=same", lambda run: ([block.name for block in run.model.blocks], ["same"] * 3)),
        ("model.blocks[1].name=a=b", lambda run: (run.model.blocks[1].name, "a=b")),
        ("model.blocks[1].name='7'", lambda run: (run.model.blocks[1].name, "7")),
        ("betas=[0.5, 0.75, 1]", lambda run: (run.betas, (0.5, 0.75, 1.0))),
        ("betas[1]=0.5", lambda run: (run.betas, (0.9, 0.5))),
        ("weights.code=2", lambda run: (dict(run.weights), {"code": 2.0})),
        ('weights["a b.c"]=2', lambda run: (dict(run.weights), {"code": 1.0, "a b.c": 2.0})),
        ("weights.*=3", lambda run: (dict(run.weights), {"code": 3.0})),
        ("weights={}", lambda run: (dict(run.weights), {})),
        ("model.extra={width: 9}", lambda run: (run.model.extra, Conv(width=9))),
        (f"model.blocks[0].mixer={{class: {__name__}.Conv, width: 2}}", lambda run: (run.model.blocks[0].mixer, Conv(width=2))),
    ],
)
def test_one_place_is_replaced_and_no_other(text: str, read: Any) -> None:
    changed = apply_sets(RUN, [text])
    value, wanted = read(changed)
    assert value == wanted
    assert type(value) is type(wanted)
    assert changed != RUN
    path = text.partition("=")[0]
    untouched = [name for name in Run.model_fields if not path.startswith(name)]
    assert all(getattr(changed, name) == getattr(RUN, name) for name in untouched)


def test_the_tree_given_is_left_alone() -> None:
    before = RUN.replace()
    apply_sets(RUN, ["model.blocks[*].name=x", "weights.new=1"])
    assert before == RUN
    assert apply_sets(RUN, []) == RUN


def test_sets_apply_in_order() -> None:
    node = f"{{class: {__name__}.Attention, num_heads: 2}}"
    changed = apply_sets(RUN, [f"model.blocks[*].mixer={node}", "model.blocks[1].mixer.num_kv_heads=2", "rate=1", "rate=2"])
    assert [block.mixer for block in changed.model.blocks] == [
        Attention(num_heads=2),
        Attention(num_heads=2, num_kv_heads=2),
        Attention(num_heads=2),
    ]
    assert changed.rate == 2.0


def test_none_is_null() -> None:
    changed = apply_sets(RUN, ["model.extra={}", "model.blocks[0].mixer.window=5"])
    assert changed.model.extra == Conv()
    assert apply_sets(changed, ["model.extra=null", "model.blocks[0].mixer.window=~"]) == RUN


@pytest.mark.parametrize(
    ("text", "path", "rule", "ways_out"),
    [
        ("modl.d_model=1", "modl", "Run has no modl", "did you mean model? it has: model, rate, betas, weights"),
        ("model.blocs[0].name=a", "model.blocs", "Model has no blocs", "did you mean blocks? it has: d_model, blocks, extra"),
        ("model.d_modl=1", "model.d_modl", "unknown key of Model", "did you mean d_model?"),
        ("model.zzz=1", "model.zzz", "unknown key of Model", "valid keys: d_model, blocks, extra"),
        ("model.blocks[0].mixer.windw=1", "model.blocks[0].mixer.windw", "unknown key of Attention", "did you mean window?"),
        ("model.blocks[3].name=a", "model.blocks[3]", "model.blocks is a list of 3 items", "use 0 to 2, -3 to -1, or *"),
        ("model.blocks[-4]=1", "model.blocks[-4]", "model.blocks is a list of 3 items", "use 0 to 2, -3 to -1, or *"),
        ("model.blocks.name=a", "model.blocks.name", "model.blocks is a list of 3 items", "use 0 to 2, -3 to -1, or *"),
        ("rate.x=1", "rate.x", "rate is the value 0.1, so nothing is inside", "set rate itself"),
        ("model.extra.width=1", "model.extra.width", "model.extra is None, so nothing is inside", "set model.extra as a whole"),
        ("weights.new.x=1", "weights.new", "weights has no new", "it has: code"),
        ("rate=fast", "rate", "must be a number", None),
        ("rate='1e-3'", "rate", "must be a number", "write 1e-3 without quotes"),
        ("rate=", "rate", "must be a number", None),
        ("model.blocks[1].name=7", "model.blocks[1].name", "must be a string", "write '7', in quotes"),
        (
            "model.blocks[0].mixer.window=None",
            "model.blocks[0].mixer.window",
            "must be an integer or None",
            "write null (None in Python)",
        ),
        (
            "model.blocks[1].mixer={width: 2}",
            "model.blocks[1].mixer.class",
            "must name the class of a Mixer",
            "write `class: mlt.module.ClassName` first",
        ),
        ("model.blocks[1].mixer=conv", "model.blocks[1].mixer", "must be a Mixer", None),
        ("rate", "--set rate", "must be path=value", "for example model.stack.period[0].norm_eps=1e-6"),
        ("=3", "--set =3", "must be path=value", "for example model.stack.period[0].norm_eps=1e-6"),
        ("model..d_model=3", "--set model..d_model=3", "must be path=value", "for example model.stack.period[0].norm_eps=1e-6"),
    ],
)
def test_what_cannot_be_set_says_where_and_what_can(text: str, path: str, rule: str, ways_out: str | None) -> None:
    assert refused(text) == [(path, rule, ways_out)]


def test_an_unreadable_value_names_the_set() -> None:
    ((path, rule, _),) = refused("betas=[1, 2")
    assert path == "betas"
    assert rule.startswith("--set betas, line 1, column ")


def test_all_problems_come_at_once_with_the_rules_that_break() -> None:
    found = refused("modl.x=1", "rate=fast", "model.blocks[0].mixer.num_kv_heads=3", "model.blocks[1].mixer.wdth=2")
    assert found == [
        ("modl", "Run has no modl", "did you mean model? it has: model, rate, betas, weights"),
        ("rate", "must be a number", None),
        ("model.blocks[1].mixer.wdth", "unknown key of Conv", "did you mean width?"),
        ("model.blocks[0].mixer.num_kv_heads", "must divide num_heads = 8", None),
    ]
    assert refused("modl.x=1", "model.blocks[0].mixer.num_kv_heads=3") == [found[0], found[3]]


def test_broken_rules_alone_are_left_to_the_check() -> None:
    changed = apply_sets(RUN, ["model.blocks[0].mixer.num_kv_heads=3"])
    assert changed.model.blocks[0].mixer == Attention(num_heads=8, num_kv_heads=3)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-99, 99) | st.text(st.characters(codec="utf-8"), min_size=1), min_size=1, max_size=5))
def test_written_paths_are_read_back(steps: list[str | int]) -> None:
    path = ""
    for step in steps:
        path = at(path, step)
    assert parse_path(path) == steps


@pytest.mark.parametrize("path", ["", ".a", "a.", "a[", "a[]", "a[x]", "a]b", "a[0", 'a["x]', "a[0]b"])
def test_unreadable_paths(path: str) -> None:
    assert parse_path(path) is None
