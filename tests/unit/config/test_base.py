"""Construction of one config node: strict types, frozen values, and every problem named with its path."""

import copy
import math
import pickle
import subprocess
import sys
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from pydantic import Field, ValidationError

from mlt.config.base import Config, FrozenMap
from mlt.config.problems import ConfigError, Problem


class Mixer(Config):
    @abstractmethod
    def build(self) -> str: ...


class Attention(Mixer):
    num_heads: int
    window: int | None = None

    def build(self) -> str:
        return "attention"


class Windowed(Attention):
    sinks: int = 4


class Conv(Mixer):
    width: int = 4

    def build(self) -> str:
        return "conv"


class Everything(Config):
    count: int = 1
    rate: float = 1
    name: str = "a"
    flag: bool = False
    mode: Literal["fsdp", "ddp"] = "ddp"
    window: int | Literal["auto"] | None = None
    sizes: tuple[int, ...] = ()
    betas: tuple[float, float] = (0.9, 0.99)
    nested: tuple[tuple[int, ...], ...] = ()
    weights: Mapping[str, float] = {"code": 1}
    tables: tuple[Mapping[str, tuple[int, ...]], ...] = ()
    mixer: Mixer = Conv()
    mixers: tuple[Attention | Conv, ...] = ()
    positive: int = Field(default=1, gt=0)
    fraction: float = Field(default=0.5, ge=0, le=1)
    eighths: Annotated[int, Field(multiple_of=8)] | Literal["all"] = 8
    unbounded: float | None = Field(default=None, allow_inf_nan=True)


def problems(**values: Any) -> tuple[Problem, ...]:
    with pytest.raises(ConfigError) as caught:
        Everything(**values)
    return caught.value.problems


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("rate", 3, 3.0),
        ("rate", np.float64(0.1), 0.1),
        ("sizes", [1, 2], (1, 2)),
        ("betas", [0, 1], (0.0, 1.0)),
        ("nested", [[1], [], (2, 3)], ((1,), (), (2, 3))),
        ("window", "auto", "auto"),
        ("window", 0, 0),
        ("window", None, None),
        ("name", np.str_("b"), "b"),
        ("weights", {"a": 2, "b": 0.5}, FrozenMap({"a": 2.0, "b": 0.5})),
        ("tables", [{"a": [1]}], (FrozenMap({"a": (1,)}),)),
        ("unbounded", -math.inf, -math.inf),
        ("mixer", Windowed(num_heads=2), Windowed(num_heads=2)),
    ],
)
def test_values_are_kept_as_the_declared_type(name: str, given: Any, kept: Any) -> None:
    value = getattr(Everything(**{name: given}), name)
    assert value == kept
    assert type(value) is type(kept)
    if isinstance(kept, tuple):
        assert [type(item) for item in value] == [type(item) for item in kept]


def test_defaults_are_converted_too() -> None:
    assert type(Everything().rate) is float
    assert Everything().weights == FrozenMap({"code": 1.0})
    assert type(Everything().weights["code"]) is float


@pytest.mark.parametrize(
    ("name", "given", "path", "rule", "ways_out"),
    [
        ("count", "3", "count", "must be an integer", "write 3 without quotes"),
        ("count", 3.0, "count", "must be an integer", "write 3"),
        ("count", True, "count", "must be an integer", None),
        ("count", None, "count", "must be an integer", None),
        ("count", np.int64(3), "count", "must be an integer", None),
        ("rate", "1e-3", "rate", "must be a number", "write 1e-3 without quotes"),
        ("rate", "nan", "rate", "must be a number", None),
        ("rate", "-inf", "rate", "must be a number", None),
        ("rate", False, "rate", "must be a number", None),
        ("rate", math.nan, "rate", "must be finite", None),
        ("rate", math.inf, "rate", "must be finite", None),
        ("betas", (0.9, math.inf), "betas[1]", "must be finite", None),
        ("betas", (0.9,), "betas[1]", "is required", "give it a number"),
        ("betas", (0.9, 0.1, 0.2), "betas", "must have at most 2 items, has 3", None),
        ("name", 3, "name", "must be a string", "write '3', in quotes"),
        ("flag", 1, "flag", "must be true or false", None),
        ("flag", "yes", "flag", "must be true or false", "write true or false, without quotes"),
        ("mode", "fdsp", "mode", "must be 'fsdp' or 'ddp'", "did you mean 'fsdp'?"),
        ("mode", "zero", "mode", "must be 'fsdp' or 'ddp'", None),
        ("mode", "dsdp", "mode", "must be 'fsdp' or 'ddp'", None),
        ("window", "atuo", "window", "must be an integer, 'auto' or None", "did you mean 'auto'?"),
        ("window", "None", "window", "must be an integer, 'auto' or None", "write null (None in Python)"),
        ("sizes", 3, "sizes", "must be a list (each item an integer)", None),
        ("sizes", (1, "x"), "sizes[1]", "must be an integer", None),
        ("nested", ((1,), (2, None)), "nested[1][1]", "must be an integer", None),
        ("weights", {"a": "b"}, "weights.a", "must be a number", None),
        ("weights", {"a b": "c"}, 'weights["a b"]', "must be a number", None),
        ("tables", ({"a": (1, "x")},), "tables[0].a[1]", "must be an integer", None),
        ("mixer", 3, "mixer", "must be a Mixer", None),
        ("mixer", Everything(), "mixer", "must be a Mixer", None),
        ("mixers", (Conv(), "x"), "mixers[1]", "must be an Attention or a Conv", None),
        ("positive", 0, "positive", "must be greater than 0", None),
        ("fraction", -0.1, "fraction", "must be at least 0", None),
        ("fraction", 1.5, "fraction", "must be at most 1", None),
        ("eighths", 12, "eighths", "must be a multiple of 8", None),
        ("eighths", "al", "eighths", "must be an integer or 'all'", "did you mean 'all'?"),
    ],
)
def test_wrong_values_are_refused_with_path_value_and_rule(
    name: str, given: Any, path: str, rule: str, ways_out: str | None
) -> None:
    (problem,) = problems(**{name: given})
    assert (problem.path, problem.rule, problem.ways_out) == (path, rule, ways_out)


def test_the_offending_value_is_reported() -> None:
    (problem,) = problems(sizes=(1, "x"))
    assert problem.value == "x"
    assert str(problem) == "sizes[1] = 'x': must be an integer"


def test_a_mapping_does_not_stand_for_a_class_in_python() -> None:
    (problem,) = problems(mixer={"width": 3})
    assert problem.path == "mixer"
    assert problem.rule == "must be a Mixer"
    assert problem.ways_out is not None
    assert "build the class" in problem.ways_out


def test_unknown_keys_name_the_nearest_or_all() -> None:
    with pytest.raises(ConfigError) as caught:
        Windowed(num_heads=1, num_head=2, Sink=3, zzz=4)  # pyright: ignore[reportCallIssue]
    assert [(problem.path, problem.value, problem.ways_out) for problem in caught.value.problems] == [
        ("num_head", 2, "did you mean num_heads?"),
        ("Sink", 3, "did you mean sinks?"),
        ("zzz", 4, "valid keys: num_heads, window, sinks"),
    ]
    assert all(problem.rule == "unknown key of Windowed" for problem in caught.value.problems)


def test_all_problems_of_a_node_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Windowed(window="x", sinks=2.5, oops=1)  # pyright: ignore
    assert sorted(problem.path for problem in caught.value.problems) == ["num_heads", "oops", "sinks", "window"]
    assert caught.value.source == "Windowed(...)"


def test_a_missing_field_says_what_it_takes() -> None:
    with pytest.raises(ConfigError, match="num_heads: is required; give it an integer"):
        Attention()  # pyright: ignore[reportCallIssue]


def test_nodes_are_frozen_hashable_and_keyword_only() -> None:
    lists: dict[str, Any] = {"sizes": [1], "tables": [{"a": [1]}]}
    node = Everything(**lists)
    assert hash(node) == hash(Everything(sizes=(1,), tables=({"a": (1,)},)))
    assert len({node, Everything(sizes=(1,), tables=({"a": (1,)},)), Everything()}) == 2
    with pytest.raises(ValidationError):
        node.count = 2  # pyright: ignore[reportAttributeAccessIssue]
    assert hash(Attention(num_heads=1)) != hash(Windowed(num_heads=1))
    with pytest.raises(TypeError):
        Conv(4)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError):
        node.weights["a"] = 1.0  # pyright: ignore[reportIndexIssue]


def test_nodes_survive_pickle_and_copy() -> None:
    node = Everything(mixer=Windowed(num_heads=2), tables=({"a": (1,)},))
    for twin in (pickle.loads(pickle.dumps(node)), copy.copy(node), copy.deepcopy(node), node.model_copy()):
        assert twin == node
        assert hash(twin) == hash(node)
        assert type(twin.mixer) is Windowed


def test_replace_checks_what_it_changes() -> None:
    node = Everything(count=3, mixer=Attention(num_heads=2))
    changed = node.replace(rate=2)
    assert (changed.count, changed.rate, type(changed.rate), changed.mixer) == (3, 2.0, float, node.mixer)
    with pytest.raises(ConfigError, match="did you mean count"):
        node.replace(cuont=1)
    with pytest.raises(ConfigError, match="count = 'x': must be an integer"):
        node.model_copy(update={"count": "x"})


def test_a_mapping_keeps_its_order_but_does_not_compare_by_it() -> None:
    one, two = Everything(weights={"a": 1, "b": 2}), Everything(weights={"b": 2, "a": 1})
    assert list(one.weights) == ["a", "b"]
    assert one == two
    assert hash(one) == hash(two)


@pytest.mark.parametrize(
    ("annotation", "advice"),
    [
        (list[int], "use tuple[X, ...]"),
        (Sequence[int], "use tuple[X, ...]"),
        (tuple, "use tuple[X, ...]"),
        (dict[str, int], "Mapping[str, X]"),
        (Mapping[int, str], "keys of a Mapping must be str"),
        (Path, "use str"),
        (tuple[Path | None, ...], "use str"),
        (Mapping[str, list[int]], "use tuple[X, ...]"),
        (Any, "no config type"),
        (Literal[b"x"], "Literal values must be plain"),
    ],
)
def test_field_types_that_cannot_be_saved_are_refused_with_the_class(annotation: Any, advice: str) -> None:
    with pytest.raises(TypeError, match=r"Odd\.x: ") as caught:
        type("Odd", (Config,), {"__annotations__": {"x": annotation}})
    assert advice in str(caught.value)


def test_abstract_bases_cannot_be_built() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Mixer()  # pyright: ignore[reportAbstractUsage]


def test_the_config_package_starts_without_jax_and_yaml() -> None:
    code = "import sys, mlt.config.load; print([name for name in ('jax', 'yaml', 'numpy', 'flax') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
