"""The closed list of types a config field may have, and how to speak of them.

bool, int, float, str, None, Literal, Config classes, tuple[...], Mapping[str, ...] and unions of these: what can be
written to YAML and read back the same, and hashed. Paths are plain strings (a Path would fold `gs://` into `gs:/`).
"""

import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from mlt.config.problems import one_of

_SCALARS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    types.NoneType: "None",
}


def unwrap(annotation: Any) -> Any:
    """The type without its metadata and aliases."""
    while True:
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        elif hasattr(annotation, "__value__"):
            annotation = annotation.__value__
        else:
            return types.NoneType if annotation is None else annotation


def members(annotation: Any) -> list[Any]:
    """The alternatives of a union, or the type itself."""
    annotation = unwrap(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        return [inner for member in get_args(annotation) for inner in members(member)]
    return [annotation]


def is_config(annotation: Any) -> bool:
    """Whether it is a Config class; told by `problems`, because `base` imports this file."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel) and hasattr(annotation, "problems")


def is_tuple(annotation: Any) -> bool:
    return get_origin(annotation) is tuple


def is_mapping(annotation: Any) -> bool:
    return get_origin(annotation) is Mapping


def config_members(annotation: Any) -> list[type[BaseModel]]:
    return [member for member in members(annotation) if is_config(member)]


def tuple_member(annotation: Any) -> Any:
    return next((member for member in members(annotation) if is_tuple(member)), None)


def mapping_member(annotation: Any) -> Any:
    return next((member for member in members(annotation) if is_mapping(member)), None)


def item_type(tuple_type: Any, index: int) -> Any:
    """The type of one item of a tuple type; object where the tuple is too short for it."""
    args = get_args(tuple_type)
    if len(args) == 2 and args[1] is Ellipsis:
        return args[0]
    return args[index] if index < len(args) else object


def value_type(mapping_type: Any) -> Any:
    return get_args(mapping_type)[1]


def refuse(annotation: Any) -> str | None:
    """Why a field may not have this type, or None."""
    for member in members(annotation):
        origin = get_origin(member)
        if member in _SCALARS or is_config(member):
            continue
        if origin is Literal:
            odd = [value for value in get_args(member) if type(value) not in _SCALARS]
            if odd:
                return f"Literal values must be plain strings, numbers or None, not {odd[0]!r}"
        elif origin is tuple:
            inner = [reason for arg in get_args(member) if arg is not Ellipsis and (reason := refuse(arg))]
            if inner:
                return inner[0]
        elif origin is Mapping:
            key, value = get_args(member)
            if unwrap(key) is not str:
                return "the keys of a Mapping must be str"
            if reason := refuse(value):
                return reason
        else:
            return f"{_name(member)} is no config type; {_instead(member)}"
    return None


def _instead(member: Any) -> str:
    kind = get_origin(member) or member
    if kind in (list, set, frozenset, tuple) or getattr(kind, "__name__", "") in (
        "Sequence",
        "Collection",
        "Iterable",
    ):
        return "use tuple[X, ...]"
    if kind is dict or getattr(kind, "__name__", "").endswith("Mapping"):
        return "use collections.abc.Mapping[str, X]"
    if getattr(kind, "__module__", "").startswith("pathlib"):
        return "use str"
    return "use bool, int, float, str, None, Literal, a Config class, tuple[...], Mapping[str, ...] or a union of these"


def _name(member: Any) -> str:
    return member.__name__ if isinstance(member, type) and not get_args(member) else str(member)


def describe(annotation: Any) -> str:
    """The type in words: `an integer, 'auto' or None`."""
    return one_of(dict.fromkeys(word for member in members(annotation) for word in _words(member)))


def _words(member: Any) -> list[str]:
    if member in _SCALARS:
        return [_SCALARS[member]]
    if get_origin(member) is Literal:
        return [repr(value) for value in get_args(member)]
    if is_config(member):
        return [f"{'an' if member.__name__[0] in 'AEIOU' else 'a'} {member.__name__}"]
    if is_mapping(member):
        return [f"a mapping (each value {describe(value_type(member))})"]
    if is_tuple(member):
        args = get_args(member)
        if len(args) == 2 and args[1] is Ellipsis:
            return [f"a list (each item {describe(args[0])})"]
        return [f"a list of {len(args)} ({', '.join(describe(arg) for arg in args)})"]
    return [_name(member)]
