"""Pydantic's complaints about one node, told as problems: readable paths, plain words, nearest names."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from mlt.config import fields
from mlt.config.problems import ABSENT, Problem, at, near, one_of, suggest

_LIMITS = {
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "multiple_of": "must be a multiple of {multiple_of}",
    "finite_number": "must be finite",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must match the pattern {pattern}",
    "too_short": "must have at least {min_length} items, has {actual_length}",
    "too_long": "must have at most {max_length} items, has {actual_length}",
}


@dataclass(frozen=True)
class _Finding:
    problem: Problem
    type_only: bool  # says only that the value is of another type: void where another union member got further


def problems_of(error: ValidationError, cls: type[BaseModel]) -> list[Problem]:
    """The problems of one node of class `cls`, paths relative to it.

    A union reports once per member; here the member that got furthest speaks, or one line names all of them.
    """
    findings: list[_Finding] = []
    for entry in error.errors(include_url=False):
        finding = _finding(entry, cls)
        if finding not in findings:
            findings.append(finding)
    return [finding.problem for finding in findings if not (finding.type_only and _outdone(finding, findings))]


def _outdone(finding: _Finding, findings: list[_Finding]) -> bool:
    path = finding.problem.path
    return any(
        other.problem.path.startswith((path + ".", path + "[")) or (other.problem.path == path and not other.type_only)
        for other in findings
    )


def _finding(entry: Any, cls: type[BaseModel]) -> _Finding:
    kind, value, context, loc = entry["type"], entry["input"], entry.get("ctx") or {}, entry["loc"]
    if kind == "extra_forbidden":
        key = str(loc[0])
        return _Finding(Problem(key, value, f"unknown key of {cls.__name__}", suggest(key, cls.model_fields)), False)
    if not loc or loc[0] not in cls.model_fields:
        return _Finding(Problem("", ABSENT, _message(kind, entry["msg"], context)), False)
    annotation = cls.model_fields[str(loc[0])].annotation
    path, annotation = _locate(str(loc[0]), annotation, loc[1:])
    if kind == "missing":
        return _Finding(Problem(path, ABSENT, "is required", f"give it {fields.describe(annotation)}"), False)
    if kind.endswith("_type") or kind in ("literal_error", "none_required", "is_instance_of"):
        return _Finding(Problem(path, value, f"must be {fields.describe(annotation)}", _hint(annotation, value)), True)
    return _Finding(Problem(path, value, _message(kind, entry["msg"], context)), False)


def _locate(path: str, annotation: Any, loc: tuple[int | str, ...]) -> tuple[str, Any]:
    """The readable path of a location inside a field, without the labels of union members, and the type there."""
    while loc:
        alternatives = [member for member in fields.members(annotation) if member is not type(None)]
        if len(alternatives) > 1:
            loc = loc[1:]
            if not loc:
                break
        step, loc = loc[0], loc[1:]
        path = at(path, step)
        if isinstance(step, int):
            annotation = fields.item_type(fields.tuple_member(annotation), step)
        elif loc == ("[key]",):
            return path, str
        else:
            annotation = fields.value_type(fields.mapping_member(annotation))
    return path, annotation


def _message(kind: str, message: str, context: dict[str, Any]) -> str:
    if kind in _LIMITS:
        plain = {
            name: int(bound) if isinstance(bound, float) and bound.is_integer() else bound for name, bound in context.items()
        }
        return _LIMITS[kind].format(**plain)
    return str(context.get("error") or message)


def _hint(annotation: Any, value: Any) -> str | None:
    """What was probably meant by a value of the wrong type."""
    types = fields.members(annotation)
    words = [word for member in types if get_origin(member) is Literal for word in get_args(member)]
    if isinstance(value, str):
        if type(None) in types and value.lower() in ("none", "null", "~", ""):
            return "write null (None in Python)"
        if bool in types and value.lower() in ("true", "false", "yes", "no", "on", "off", "0", "1"):
            return "write true or false, without quotes"
        if (int in types and _reads_as(int, value)) or (float in types and _reads_as(float, value)):
            return f"write {value.strip()} without quotes"
        close = near(value, [word for word in words if isinstance(word, str)])
        told = len(close) == len(words) > 1  # the rule names all of them
        return f"did you mean {one_of(map(repr, close))}?" if close and not told else None
    if isinstance(value, float) and int in types and value.is_integer():
        return f"write {int(value)}"
    if isinstance(value, (bool, int, float)) and str in types:
        return f"write '{value}', in quotes"
    if any(map(fields.is_config, types)) and hasattr(value, "items"):
        return "a mapping is read as a config class in YAML only; in Python, build the class"
    return None


def _reads_as(kind: type, text: str) -> bool:
    """Whether the text is a number that a field may have: `nan` and `inf` are none, quoted or not."""
    try:
        return math.isfinite(kind(text))
    except (ValueError, OverflowError):
        return False
