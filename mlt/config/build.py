"""Plain data to a config tree, every problem collected on the way."""

from collections.abc import Mapping
from typing import Any, Final

from mlt.config import fields
from mlt.config.base import Config
from mlt.config.classes import UnknownClass, find_class, is_abstract
from mlt.config.problems import ABSENT, ConfigError, Problem, at, collect_problems, suggest

_BROKEN: Final = object()


def build(data: Any, root: type[Config] = Config, source: str | None = None) -> Config:
    """The tree that plain data (mappings, lists, scalars, with `class:` keys) describes.

    Raises:
        ConfigError: every problem of every node; where a node is broken, also the broken rules of the intact nodes
            beneath it, so that nothing waits for a second try. The rules of an intact tree are left to `check_tree`.
    """
    found: list[Problem] = []
    tree = _node(root, data, "", found)
    if found:
        raise ConfigError(found, source)
    return tree


def implied_class(annotation: Any) -> type[Config] | None:
    """The class that a mapping without `class:` stands for in a field of this type, if that is unambiguous."""
    classes = fields.config_members(annotation)
    if len(classes) != 1 or fields.mapping_member(annotation) is not None:
        return None
    (only,) = classes
    return only if issubclass(only, Config) and not is_abstract(only) else None


def _node(annotation: Any, data: Any, path: str, found: list[Problem]) -> Any:
    """Build one node; problems go to `found`, and _BROKEN comes back if there were any."""
    cls = _class_of(annotation, data, path, found)
    if cls is None:
        return _BROKEN
    given = {key: value for key, value in data.items() if key != "class"}
    values: dict[str, Any] = {}
    own: list[Problem] = []
    inner: list[Problem] = []
    broken: set[str] = set()
    for key, value in given.items():
        if key not in cls.model_fields:
            own.append(Problem(str(key), value, f"unknown key of {cls.__name__}", suggest(str(key), cls.model_fields)))
            continue
        built = _value(cls.model_fields[key].annotation, value, at(path, key), inner)
        if built is _BROKEN:
            broken.add(key)
        else:
            values[key] = built
    node: Any = _BROKEN
    try:
        node = cls(**values)
    except ConfigError as error:
        own += [problem for problem in error.problems if problem.path not in broken]
    found += [problem.under(path) for problem in own] + inner
    if node is not _BROKEN and not own and not broken:
        return node
    if node is not _BROKEN and not broken:  # only unknown keys: its rules can be told already
        found += collect_problems(node, path)
    else:
        for key, value in values.items():
            found += collect_problems(value, at(path, key))
    return _BROKEN


def _class_of(annotation: Any, data: Any, path: str, found: list[Problem]) -> type[Config] | None:
    allowed = tuple(fields.config_members(annotation))
    wanted = fields.describe(annotation)
    if not isinstance(data, Mapping):
        found.append(Problem(path, data, f"must be a mapping that describes {wanted}"))
        return None
    name = data.get("class", ABSENT)
    if name is ABSENT:
        cls = implied_class(annotation)
        if cls is None:
            rule = f"must name the class of {wanted}"
            found.append(Problem(at(path, "class"), ABSENT, rule, "write `class: mlt.module.ClassName` first"))
        return cls
    try:
        cls = find_class(name)
        if not issubclass(cls, allowed):
            raise UnknownClass(f"must be {wanted}, but {cls.__name__} is not one")
        if is_abstract(cls):
            raise UnknownClass(f"{cls.__name__} is only a base class", "name one of its subclasses")
    except UnknownClass as error:
        found.append(Problem(at(path, "class"), name, error.rule, error.ways_out))
        return None
    return cls


def _value(annotation: Any, value: Any, path: str, found: list[Problem]) -> Any:
    """Build what a field holds. Values of the wrong kind pass through: the class they are for refuses them."""
    if isinstance(value, Mapping):
        mapping = fields.mapping_member(annotation)
        if fields.config_members(annotation) and (mapping is None or "class" in value):
            return _node(annotation, value, path, found)
        if mapping is not None:
            inner = fields.value_type(mapping)
            items = {key: _value(inner, item, at(path, str(key)), found) for key, item in value.items()}
            return _intact(items, list(items.values()), path, found, list(items))
    elif isinstance(value, (list, tuple)) and (kind := fields.tuple_member(annotation)) is not None:
        items = [_value(fields.item_type(kind, i), item, at(path, i), found) for i, item in enumerate(value)]
        return _intact(items, items, path, found, list(range(len(items))))
    return value


def _intact(whole: Any, items: list[Any], path: str, found: list[Problem], steps: list[Any]) -> Any:
    """The container if all its items were built; else _BROKEN, and the rules of the items that were."""
    if not any(item is _BROKEN for item in items):
        return whole
    for step, item in zip(steps, items, strict=True):
        if item is not _BROKEN:
            found += collect_problems(item, at(path, step))
    return _BROKEN
