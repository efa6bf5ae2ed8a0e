"""A config tree as plain data, YAML, a hash, and the difference of two."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from mlt.config import fields
from mlt.config.base import Config, FrozenMap
from mlt.config.build import build, implied_class
from mlt.config.classes import UnknownClass, class_name
from mlt.config.problems import ABSENT, ConfigError, Problem, at, shorten


def to_plain(tree: Config, *, all_classes: bool = False) -> dict[str, Any]:
    """The tree as dicts, lists and scalars, all fields included, defaults too.

    A node starts with its `class` where the field's type does not imply it (at the root always), or everywhere.

    Raises:
        ConfigError: a class that could not be loaded back, such as one defined in a config file.
    """
    return _plain(tree, Config, "", all_classes)


def _plain(value: Any, annotation: Any, path: str, all_classes: bool) -> Any:
    if isinstance(value, Config):
        cls = type(value)
        plain: dict[str, Any] = {}
        if all_classes or implied_class(annotation) is not cls:
            try:
                plain["class"] = class_name(cls)
            except UnknownClass as error:
                raise ConfigError([Problem(path, value, error.rule, error.ways_out)]) from None
        for name, field in cls.model_fields.items():
            plain[name] = _plain(getattr(value, name), field.annotation, at(path, name), all_classes)
        return plain
    if isinstance(value, tuple):
        kind = fields.tuple_member(annotation)
        return [_plain(item, fields.item_type(kind, i), at(path, i), all_classes) for i, item in enumerate(value)]
    if isinstance(value, FrozenMap):
        kind = fields.value_type(fields.mapping_member(annotation))
        return {key: _plain(item, kind, at(path, key), all_classes) for key, item in value.items()}
    return value


def to_yaml(tree: Config) -> str:
    """The tree as readable YAML; `from_yaml` gives back an equal tree of the same types."""
    from mlt.config.text import write_yaml

    return write_yaml(to_plain(tree))


def from_yaml(text: str, *, root: type[Config] = Config, source: str | None = None) -> Config:
    """The tree of a YAML text. Rules are not checked here: see `check_tree`.

    Raises:
        UserError: no valid YAML (with the line).
        ConfigError: every unknown key, wrong type and unknown class, with paths.
    """
    from mlt.config.text import read_yaml

    return build(read_yaml(text, source or "text"), root, source)


def config_hash(tree: Config) -> str:
    """16 hex digits that stand for every class and value of the tree (SHA-256 of its canonical JSON)."""
    text = json.dumps(to_plain(tree, all_classes=True), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def diff(old: Config | Mapping[str, Any], new: Config | Mapping[str, Any]) -> list[str]:
    """One line `path: old -> new` for each difference; `absent` stands for a key or item that one side lacks.

    Either side may be the plain data of a saved config that can no longer be built.
    """
    lines: list[str] = []
    _diff(_side(old), _side(new), "", lines)
    return lines


def _side(tree: Config | Mapping[str, Any]) -> Any:
    return to_plain(tree) if isinstance(tree, Config) else tree


def _diff(old: Any, new: Any, path: str, lines: list[str]) -> None:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            _diff(old.get(key, ABSENT), new.get(key, ABSENT), at(path, key), lines)
    elif isinstance(old, list) and isinstance(new, list):
        for index in range(max(len(old), len(new))):
            left, right = (side[index] if index < len(side) else ABSENT for side in (old, new))
            _diff(left, right, at(path, index), lines)
    elif old != new or type(old) is not type(new):
        lines.append(f"{path or 'config'}: {shorten(old)} -> {shorten(new)}")
