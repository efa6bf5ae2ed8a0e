"""A config tree as plain data, YAML, hashes, and the difference of two."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from mlt.config import fields
from mlt.config.base import Config, FrozenMap
from mlt.config.build import build, implied_class
from mlt.config.classes import UnknownClass, class_name
from mlt.config.exempt import ASKED, ROOT, asked, exemption, without_exempt
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
    """16 hex digits that stand for what a checkpoint is bound to: what the run computes.

    Left out are the fields that may change when a run is resumed (`mlt.config.exempt`), and fields at their defaults, so
    that a version of mlt with more fields still knows its checkpoints. (A default that changes shows in `binding_changes`:
    a saved config names every value.)
    """
    plain = _bound(tree)
    return _hash(without_exempt(plain, at) if class_name(type(tree)) == ROOT else plain)


def full_hash(tree: Config) -> str:
    """16 hex digits that stand for every class and value of the tree: what all processes of a run must share."""
    return _hash(to_plain(tree, all_classes=True))


def _hash(plain: Any) -> str:
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _bound(value: Any) -> Any:
    """Plain data with the class of every node, without the fields that are at their defaults."""
    if isinstance(value, Config):
        fields_set = {name: _bound(getattr(value, name)) for name in type(value).model_fields}
        defaults = {
            name: _bound(field.get_default(call_default_factory=True))
            for name, field in type(value).model_fields.items()
            if not field.is_required()
        }
        kept = {k: v for k, v in fields_set.items() if k not in defaults or json.dumps(v) != json.dumps(defaults[k])}
        return {"class": class_name(type(value)), **kept}
    if isinstance(value, tuple | list):
        return [_bound(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _bound(value[key]) for key in sorted(value)}
    return value


Difference = tuple[str, Any, Any]
"""(path, old, new); ABSENT stands for a key or item that one side lacks."""


def diff(old: Config | Mapping[str, Any], new: Config | Mapping[str, Any]) -> list[str]:
    """One line `path: old -> new` for each difference; `absent` stands for a key or item that one side lacks.

    Either side may be the plain data of a saved config that can no longer be built.
    """
    return [_line(*found) for found in _differences(old, new)]


def binding_changes(old: Config, new: Config) -> list[str]:
    """The lines of `diff` that forbid to resume a run of the config `old` with `new`."""
    plain = _side(new)
    found = [one for one in _differences(old, new) if exemption(one[0]) is None and asked(one[0], plain) is None]
    return [_line(*one) + (f" (accepted with {ASKED[one[0]][0]}=true)" if one[0] in ASKED else "") for one in found]


def allowed_changes(old: Config, new: Config) -> list[str]:
    """The lines of `diff` that do not forbid it, each with what it is about."""
    plain, found = _side(new), _differences(old, new)
    return [f"{_line(*one)} ({why})" for one in found if (why := exemption(one[0]) or asked(one[0], plain)) is not None]


def _differences(old: Config | Mapping[str, Any], new: Config | Mapping[str, Any]) -> list[Difference]:
    found: list[Difference] = []
    _diff(_side(old), _side(new), "", found)
    return found


def _line(path: str, old: Any, new: Any) -> str:
    return f"{path or 'config'}: {shorten(old)} -> {shorten(new)}"


def _side(tree: Config | Mapping[str, Any]) -> Any:
    return to_plain(tree) if isinstance(tree, Config) else tree


def _diff(old: Any, new: Any, path: str, found: list[Difference]) -> None:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            _diff(old.get(key, ABSENT), new.get(key, ABSENT), at(path, key), found)
    elif isinstance(old, list) and isinstance(new, list):
        for index in range(max(len(old), len(new))):
            left, right = (side[index] if index < len(side) else ABSENT for side in (old, new))
            _diff(left, right, at(path, index), found)
    elif old != new or type(old) is not type(new):
        found.append((path, old, new))
