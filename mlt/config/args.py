"""`--arg name=value`: the text of an argument as the value that a config function's parameter is declared to take."""

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, get_args, get_origin

from mlt.config import fields
from mlt.config.problems import ABSENT, ConfigError, Problem, near, one_of
from mlt.errors import UserError

_WORDS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}
_SEQUENCES = (tuple, list, Sequence)


def convert_args(function: Callable[..., Any], args: Mapping[str, Any] | Sequence[str], source: str) -> dict[str, Any]:
    """The keyword arguments for a config function.

    `args` maps names to texts, or is a list of `name=value`. A text is read as the parameter's annotation says, else as
    the type of its default: bool, int, float, str, None, Literal, unions of them, or a comma-separated list for a
    tuple. Values that are no strings are taken as they are.

    Raises:
        ConfigError: every unknown name (with the nearest), unreadable value and missing argument.
    """
    found: list[Problem] = []
    parameters = _parameters(function, source)
    given: dict[str, Any] = {}
    for name, value in _pairs(args, found):
        if name not in parameters:
            known = [_declaration(parameter) for parameter in parameters.values()]
            close = near(name, parameters)
            ways_out = f"{f'did you mean {one_of(close)}? ' if close else ''}parameters: {', '.join(known) or 'none'}"
            found.append(Problem(f"--arg {name}", value, "no parameter of config()", ways_out))
            continue
        try:
            given[name] = _convert(value, _type_of(parameters[name])) if isinstance(value, str) else value
        except ValueError as error:
            found.append(Problem(f"--arg {name}", value, str(error)))
            given[name] = value
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in given:
            found.append(Problem(f"--arg {name}", ABSENT, "is required", f"give --arg {name}=..."))
    if found:
        raise ConfigError(found, source)
    return given


def _pairs(args: Mapping[str, Any] | Sequence[str], found: list[Problem]) -> list[tuple[str, Any]]:
    if isinstance(args, Mapping):
        return list(args.items())
    pairs: list[tuple[str, Any]] = []
    for text in args:
        name, equals, value = text.partition("=")
        if equals:
            pairs.append((name.strip(), value))
        else:
            found.append(Problem(f"--arg {text}", ABSENT, "must be name=value", "for example depth=12"))
    return pairs


def _parameters(function: Callable[..., Any], source: str) -> dict[str, inspect.Parameter]:
    try:
        parameters = inspect.signature(function, eval_str=True).parameters
    except (NameError, TypeError, ValueError) as error:
        raise UserError(f"{source}: the signature of config() cannot be read: {error}") from error
    for parameter in parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UserError(f"{source}: config() must take named parameters only, not {parameter}")
    return dict(parameters)


def _declaration(parameter: inspect.Parameter) -> str:
    return parameter.name if parameter.default is parameter.empty else f"{parameter.name}={parameter.default!r}"


def _type_of(parameter: inspect.Parameter) -> Any:
    if parameter.annotation is not parameter.empty:
        return parameter.annotation
    default = None if parameter.default is parameter.empty else parameter.default
    if isinstance(default, (tuple, list)):
        return tuple[type(default[0]) if default else str, ...]
    return str if default is None else type(default)


def _convert(text: str, annotation: Any) -> Any:
    """Read a text as a type; ValueError says what it must be. In a union the first member that reads it wins,
    strings last."""
    alternatives = fields.members(annotation)
    for member in sorted(alternatives, key=lambda member: member is str):
        try:
            return _read(text, member)
        except ValueError as error:
            if len(alternatives) == 1:
                raise ValueError(str(error)) from None
    raise ValueError(f"must be {fields.describe(annotation)}")


def _read(text: str, kind: Any) -> Any:
    """Read a text as one type that is no union."""
    word = text.strip().lower()
    origin = get_origin(kind) or kind
    if kind is str:
        return text
    if origin in _SEQUENCES:
        return _read_list(text, kind, list if origin is list else tuple)
    if origin is Literal:
        for value in get_args(kind):
            if text.strip() == str(value):
                return value
    elif kind is types.NoneType:
        if word in ("none", "null"):
            return None
    elif kind is bool:
        if word in _WORDS:
            return _WORDS[word]
    elif kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    else:
        raise ValueError(f"a parameter of type {getattr(kind, '__name__', kind)} cannot be given on the command line")
    raise ValueError(f"must be {fields.describe(kind)}")


def _read_list(text: str, kind: Any, make: Callable[[Any], Any]) -> Any:
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    types_of_items = get_args(kind) or (str, ...)
    fixed = get_origin(kind) is tuple and types_of_items[-1] is not Ellipsis
    if fixed and len(parts) != len(types_of_items):
        raise ValueError(f"must be {len(types_of_items)} values between commas, not {len(parts)}")
    item_types = types_of_items if fixed else [types_of_items[0]] * len(parts)
    return make(_convert(part, item) for part, item in zip(parts, item_types, strict=True))
