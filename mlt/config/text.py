"""The YAML dialect of saved configs: plain data to text and back, nothing lost and nothing guessed.

YAML 1.2 scalars (`1e-3` is a number, `no` and `2024-01-01` are strings) plus `_` between digits; numbers are decimal.
A key given twice is an error. The same table of scalars serves reading and writing, so that a string which looks like
a number is written in quotes.
"""

import re
from typing import Any, ClassVar

import yaml

from mlt.errors import UserError

_DIGITS = r"[0-9](?:_?[0-9])*"
_SCALARS = (
    ("tag:yaml.org,2002:null", r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("tag:yaml.org,2002:int", rf"[-+]?{_DIGITS}$", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        rf"(?:[-+]?(?:\.{_DIGITS}|{_DIGITS}(?:\.(?:{_DIGITS})?)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is no string", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _read_int(loader: yaml.SafeLoader, node: Any) -> int:
    return int(loader.construct_scalar(node))


def _read_float(loader: yaml.SafeLoader, node: Any) -> float:
    return float(loader.construct_scalar(node).lower().replace(".inf", "inf").replace(".nan", "nan"))


def _write_float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    text = repr(value)
    if text.lstrip("-") in ("inf", "nan"):
        text = text.replace("inf", ".inf").replace("nan", ".nan")
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


def _write_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if re.search("[\n\r\x85\u2028\u2029]", text) else None  # PyYAML folds such breaks in other styles
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _write_list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.SequenceNode:
    flow = not any(isinstance(item, (dict, list)) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=flow)


for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(_pattern), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _read_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _read_float)
_Dumper.add_representer(float, _write_float)
_Dumper.add_representer(str, _write_text)
_Dumper.add_representer(list, _write_list)


def write_yaml(data: Any) -> str:
    """Block YAML of plain data (dict, list, str, bool, int, float, None), keys in their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=110, allow_unicode=True)


def read_yaml(text: str, source: str = "text") -> Any:
    """Plain data of a YAML text. Raises UserError with the line of the first mistake."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = " ".join(filter(None, (error.context, error.problem)))
        raise UserError(f"{source}{line}: no valid YAML: {reason}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{source}: no valid YAML: {' '.join(str(error).split())}") from None
