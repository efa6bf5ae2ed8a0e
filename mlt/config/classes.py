"""Config classes by full name, as saved configs write them.

The class itself is the name: no registry. Only `mlt` is imported from; classes of test modules (`tests.`) are found
where the module is already loaded, so that a saved text can never run code that is not ours.
"""

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from mlt.config.base import Config
from mlt.config.problems import near, one_of, suggest


class UnknownClass(LookupError):
    """No config class has this name. Says which rule it breaks and what to use instead."""

    def __init__(self, rule: str, ways_out: str | None = None):
        super().__init__(rule, ways_out)
        self.rule = rule
        self.ways_out = ways_out


def class_name(cls: type[Config]) -> str:
    """The full name a class loads back by. Raises UnknownClass for a class that cannot be loaded by name."""
    name = f"{cls.__module__}.{cls.__qualname__}"
    if cls.__module__.partition(".")[0] not in ("mlt", "tests") or "." in cls.__qualname__:
        raise UnknownClass(
            f"{name} cannot be saved: a saved config loads only top-level classes from mlt",
            "move the class into a file of its own under mlt/",
        )
    return name


def is_abstract(cls: type[Config]) -> bool:
    """Whether the class only serves as an annotation, so that data must name a subclass."""
    return cls is Config or inspect.isabstract(cls)


def find_class(name: Any) -> type[Config]:
    """The config class with this full name, imported if need be. Raises UnknownClass."""
    if not isinstance(name, str) or "." not in name:
        raise UnknownClass("must be the full name of a config class, such as mlt.mixers.sequence.attention.Attention")
    module_name, _, leaf = name.rpartition(".")
    module = _module(module_name)
    found = getattr(module, leaf, None)
    if isinstance(found, type) and issubclass(found, Config):
        return found
    present = [key for key, value in vars(module).items() if _is_own_config(value, module_name)]
    raise UnknownClass(f"{module_name} has no config class {leaf}", suggest(leaf, present, choices="it has", list_all=True))


def _is_own_config(value: Any, module_name: str) -> bool:
    return isinstance(value, type) and issubclass(value, Config) and value.__module__ == module_name


def _module(name: str) -> ModuleType:
    root = name.partition(".")[0]
    if root == "tests" and name in sys.modules:
        return sys.modules[name]
    if root != "mlt":
        raise UnknownClass("classes load only from mlt")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise UnknownClass(f"{name} cannot be imported here: {error}") from error
    modules = list(_modules(root))
    last = name.rpartition(".")[2]
    matches = [module for module in modules if module.rpartition(".")[2] == last][:3] or near(name, modules, cutoff=0.85)
    folder = _nearest_package(name)
    inside = ", ".join(sorted(info.name for info in pkgutil.iter_modules(folder.__path__)))
    guess = f"did you mean {one_of(matches)}? " if matches else ""
    raise UnknownClass(f"there is no module {name}", f"{guess}{folder.__name__} has: {inside or 'nothing'}")


def _nearest_package(name: str) -> ModuleType:
    """The innermost package on the way to a missing module."""
    while name := name.rpartition(".")[0]:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        if hasattr(module, "__path__"):
            return module
    return importlib.import_module("mlt")


def _modules(package: str) -> Iterator[str]:
    """The names of all modules in a package; imports its sub-packages only."""
    yield from (info.name for info in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."))
