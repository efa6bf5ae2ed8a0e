"""CONFIG files, saved trees and run directories, with their arguments, overrides and every way they can fail."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from mlt.config.args import convert_args
from mlt.config.base import Config
from mlt.config.dump import to_yaml
from mlt.config.load import load_config, sibling
from mlt.config.problems import ConfigError, Problem
from mlt.errors import UserError


class Tiny(Config):
    depth: int = 2
    width: int = 8
    name: str = "tiny"

    def problems(self) -> Iterator[Problem]:
        if self.width % self.depth:
            yield Problem("width", self.width, f"must be a multiple of depth = {self.depth}")


class Other(Config):
    pass


HEAD = f"import sys\n\nTiny = sys.modules[{__name__!r}].Tiny\nOther = sys.modules[{__name__!r}].Other\n\n"


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(body: str, name: str = "tiny.py") -> Path:
        path = tmp_path / name
        path.write_text(HEAD + body if name.endswith(".py") else body, encoding="utf-8")
        return path

    return write


def message(path: Path | str, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, **options)
    return str(caught.value)


PLAIN = "def config(*, depth: int = 2, name: str = 'tiny'):\n    return Tiny(depth=depth, name=name)\n"


def test_a_python_file_with_args_and_sets(write: Any) -> None:
    path = write(PLAIN)
    assert load_config(path) == Tiny()
    assert load_config(path, args=["depth=4", "name=a=b"], root=Tiny) == Tiny(depth=4, name="a=b")
    assert load_config(str(path), args={"depth": "4"}, sets=["width=12"]) == Tiny(depth=4, width=12)
    assert load_config(path, args={"depth": 8}) == Tiny(depth=8)
    assert not list(path.parent.glob("__pycache__"))


def test_a_saved_file_and_a_run_directory(tmp_path: Path) -> None:
    tree = Tiny(depth=4, name="saved")
    (tmp_path / "config.yaml").write_text(to_yaml(tree))
    assert load_config(tmp_path) == tree
    assert load_config(tmp_path / "config.yaml", sets=["width=4"]) == tree.replace(width=4)


def test_sources_are_named_in_reports(write: Any) -> None:
    path = write(PLAIN)
    report = message(path, args=["depth=3"])
    assert report == f"1 config problem in {path}:\n  1. width = 8: must be a multiple of depth = 3"
    saved = write(to_yaml(Tiny(depth=3)), "config.yaml")
    assert message(saved).startswith(f"1 config problem in {saved}:")
    assert load_config(saved, check=False) == Tiny(depth=3)
    assert message(saved, sets=["wdth=9"]) == (
        f"2 config problems in {saved}:\n"
        "  1. wdth = 9: unknown key of Tiny; did you mean width?\n"
        "  2. width = 8: must be a multiple of depth = 3"
    )


def test_missing_files(write: Any, tmp_path: Path) -> None:
    write(PLAIN)
    for hidden in (".git", "__pycache__"):
        (tmp_path / hidden).mkdir()
    assert message(tmp_path / "tinny.py") == f"{tmp_path / 'tinny.py'}: there is no such file; did you mean tiny.py?"
    assert message(tmp_path / "zzzzz.py").endswith("there is no such file; its folder has: tiny.py")
    assert "nor the folder" in message(tmp_path / "no" / "tiny.py")
    assert "is no run directory: it has no config.yaml" in message(tmp_path)
    (tmp_path / "a.json").write_text("{}")
    assert "a config is a .py file, a .yaml file or a run directory" in message(tmp_path / "a.json")
    (tmp_path / "latin.yaml").write_bytes(b"\xff\xfe\xff")
    assert f"{tmp_path / 'latin.yaml'} cannot be read" in message(tmp_path / "latin.yaml")


def test_errors_of_a_python_file_show_its_line(write: Any) -> None:
    lines = HEAD.count("\n")
    path = write("def config():\n    return Tiny(depth=2\n")
    assert message(path).startswith(f"{path}, line {lines + 2}: SyntaxError: ")
    path = write("import mlt_no_such_module\n")
    assert message(path) == (
        f"{path}, line {lines + 1}: ModuleNotFoundError: No module named 'mlt_no_such_module'\n    import mlt_no_such_module"
    )
    path = write("def config():\n    width = [8]\n    return Tiny(width=width[1])\n")
    assert message(path) == f"{path}, line {lines + 3}: IndexError: list index out of range\n    return Tiny(width=width[1])"
    path = write("import json\n\ndef config():\n    return json.loads('{')\n")
    assert f"{path}, line {lines + 4}: JSONDecodeError: " in message(path)
    assert f"(raised in {sys.modules['json.decoder'].__file__}, line " in message(path)


def test_config_problems_in_a_python_file_keep_their_report(write: Any) -> None:
    path = write("def config():\n    return Tiny(dept=2, width='8')\n")
    assert message(path) == (
        f"2 config problems in {path}, line {HEAD.count(chr(10)) + 2}, Tiny(...):\n"
        "  1. width = '8': must be an integer; write 8 without quotes\n"
        "  2. dept = 2: unknown key of Tiny; did you mean depth?"
    )
    path = write("from mlt.errors import UserError\n\ndef config():\n    raise UserError('no corpus here')\n")
    assert message(path) == "no corpus here"


def test_what_is_not_a_run(write: Any) -> None:
    path = write("def confg():\n    return Tiny()\n")
    assert "must define a function `config`" in message(path)
    assert "did you mean confg?" in message(path)
    path = write("def config():\n    return {'depth': 2}\n")
    assert message(path, root=Tiny) == f"{path}: config() returned a value of type dict, but must give a Tiny"
    path = write("def config():\n    Tiny()\n")
    assert message(path) == f"{path}: config() returned None, but must give a Config"
    path = write("def config():\n    return Other()\n")
    assert message(path, root=Tiny) == f"{path}: config() returned a value of type Other, but must give a Tiny"
    saved = write(to_yaml(Other()), "other.yaml")
    assert "must be a Tiny, but Other is not one" in message(saved, root=Tiny)
    assert message(saved, args=["a=1"]) == f"{saved} is a finished config: it takes no --arg, only --set path=value"
    assert "line 2" in message(write("class: a\n b: c\n", "bad.yaml"))


def test_a_saved_tree_need_not_name_the_class_that_is_wanted(write: Any) -> None:
    assert load_config(write("depth: 4\n", "plain.yaml"), root=Tiny) == Tiny(depth=4)
    assert "dpth = 4: unknown key of Tiny; did you mean depth?" in message(write("dpth: 4\n", "odd.yaml"), root=Tiny)


def test_a_file_builds_on_its_sibling(write: Any) -> None:
    write(PLAIN, "base.py")
    path = write(
        "from mlt.config.load import sibling\n\nbase = sibling(__file__, 'base.py')\n\n"
        "def config(depth: int = 4):\n    return base.config(depth=depth).replace(name='derived')\n",
        "derived.py",
    )
    assert load_config(path) == Tiny(depth=4, name="derived")
    with pytest.raises(UserError, match=r"bse\.py: there is no such file; did you mean base\.py"):
        sibling(str(path), "bse.py")
    write("1 / 0\n", "base.py")
    assert message(path).startswith(f"{path.parent / 'base.py'}, line {HEAD.count(chr(10)) + 1}: ZeroDivisionError: ")


def options(
    count: int = 1,
    rate: float = 0.5,
    flag: bool = False,
    name: str = "a",
    window: int | None = None,
    size: int | str = 3,
    sizes: tuple[int, ...] = (1,),
    pair: tuple[str, float] = ("a", 1.0),
    names: Sequence[str] = (),
    items: list[int] | None = None,
    untyped=0.25,
    untyped_list=(1, 2),
    untyped_none=None,
) -> Mapping[str, Any]:
    return locals()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("count=12", 12),
        ("count=1_000", 1000),
        ("rate=1e-3", 1e-3),
        ("rate=2", 2.0),
        ("flag=true", True),
        ("flag=No", False),
        ("flag=1", True),
        ("name=12", "12"),
        ("name=", ""),
        ("window=None", None),
        ("window=64", 64),
        ("size=12", 12),
        ("size=large", "large"),
        ("sizes=1, 2,3", (1, 2, 3)),
        ("sizes=", ()),
        ("pair=b,2", ("b", 2.0)),
        ("names=a,b", ("a", "b")),
        ("items=4", [4]),
        ("items=null", None),
        ("untyped=2", 2.0),
        ("untyped_list=3", (3,)),
        ("untyped_none=x", "x"),
    ],
)
def test_arguments_are_read_as_declared(text: str, value: Any) -> None:
    ((_, read),) = convert_args(options, [text], "f.py").items()
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("count=1.5", "must be an integer"),
        ("count=1e3", "must be an integer"),
        ("rate=fast", "must be a number"),
        ("flag=2", "must be true or false"),
        ("window=x", "must be an integer or None"),
        ("sizes=1,x", "must be an integer"),
        ("pair=a", "must be 2 values between commas, not 1"),
    ],
)
def test_unreadable_arguments_say_what_they_must_be(text: str, rule: str) -> None:
    with pytest.raises(ConfigError) as caught:
        convert_args(options, [text], "f.py")
    (problem,) = caught.value.problems
    name, _, value = text.partition("=")
    assert (problem.path, problem.value, problem.rule) == (f"--arg {name}", value, rule)


def test_all_argument_problems_come_at_once_with_the_parameters(write: Any) -> None:
    path = write("def config(*, steps: int, depth: int = 2, name='x'):\n    return Tiny(depth=depth)\n")
    assert message(path, args=["dept=3", "depth=x", "plain", "zzz=1"]) == (
        f"5 config problems in {path}:\n"
        "  1. --arg plain: must be name=value; for example depth=12\n"
        "  2. --arg dept = '3': no parameter of config(); did you mean depth? parameters: steps, depth=2, name='x'\n"
        "  3. --arg depth = 'x': must be an integer\n"
        "  4. --arg zzz = '1': no parameter of config(); parameters: steps, depth=2, name='x'\n"
        "  5. --arg steps: is required; give --arg steps=..."
    )


def test_signatures_that_cannot_take_arguments(write: Any) -> None:
    assert "must take named parameters only, not **rest" in message(write("def config(**rest):\n    return Tiny()\n"))
    assert "must take named parameters only, not *rest" in message(write("def config(*rest):\n    return Tiny()\n"))
    path = write("def config(part: 'Tiny' = Tiny(), kind: 'Nope' = 1):\n    return Tiny()\n")
    assert "the signature of config() cannot be read: name 'Nope' is not defined" in message(path)
    path = write("def config(part: 'Tiny' = Tiny()):\n    return part\n")
    assert "a parameter of type Tiny cannot be given on the command line" in message(path, args=["part=x"])
    assert load_config(path) == Tiny()
