"""A CONFIG, as the commands take it, to a finished and checked tree.

CONFIG is a Python file with a function `config`, a saved YAML file, or a run directory (its `config.yaml`). A Python
file is run by its path, under a private name: it imports `mlt` and installed packages, and reaches a file beside it
with `sibling(__file__, "other.py")`.
"""

import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from mlt.config.args import convert_args
from mlt.config.base import Config
from mlt.config.dump import from_yaml
from mlt.config.override import apply_sets
from mlt.config.problems import ConfigError, check_tree, suggest
from mlt.errors import UserError

C = TypeVar("C", bound=Config)
_ANY: Any = Config


def load_config(
    path: str | Path,
    *,
    args: Mapping[str, Any] | Sequence[str] = (),
    sets: Sequence[str] = (),
    root: type[C] = _ANY,
    check: bool = True,
) -> C:
    """The config tree of a CONFIG, overrides applied, all rules checked.

    Args:
        path: a `.py` file, a `.yaml` file, or a directory with a `config.yaml`.
        args: arguments of the function in a `.py` file, `name=value` texts or a mapping.
        sets: `path=value` replacements in the finished tree (`override.apply_sets`).
        root: class that the tree must be an instance of.
        check: collect the broken rules of the tree and raise; False leaves that to the caller.

    Raises:
        UserError: the file is missing or unreadable, fails while it runs, or gives something else than a tree.
        ConfigError: every problem of the tree, of `args` or of `sets`.
    """
    file = _find(Path(path))
    source = str(file)
    if file.suffix == ".py":
        tree = _run(file, args)
    elif args:
        raise UserError(f"{source} is a finished config: it takes no --arg, only --set path=value")
    else:
        tree = from_yaml(_read(file), root=root, source=source)
    if not isinstance(tree, root):
        raise UserError(f"{source}: config() returned {_kind(tree)}, but must give a {root.__name__}")
    if sets:
        tree = apply_sets(tree, sets, source=source)
    if check:
        check_tree(tree, source)
    return tree


def sibling(file: str, name: str) -> ModuleType:
    """The Python file `name` beside `file` (pass `__file__`), as a module: how one config builds on another."""
    return _module(_find(Path(file).parent / name))


def _kind(value: Any) -> str:
    return f"{value!r}" if value is None else f"a value of type {type(value).__name__}"


def _find(path: Path) -> Path:
    """The file that a CONFIG means."""
    if path.is_dir():
        inside = path / "config.yaml"
        if not inside.is_file():
            raise UserError(f"{path} is no run directory: it has no config.yaml; give a .py file, a .yaml file or a run")
        return inside
    if not path.exists():
        folder = path.parent
        if not folder.is_dir():
            raise UserError(f"{path}: there is no such file, nor the folder {folder}")
        beside = sorted(entry.name for entry in folder.iterdir() if _may_hold_a_config(entry))
        raise UserError(f"{path}: there is no such file; {suggest(path.name, beside, choices='its folder has')}")
    if path.suffix not in (".py", ".yaml", ".yml"):
        raise UserError(f"{path}: a config is a .py file, a .yaml file or a run directory")
    return path


def _may_hold_a_config(entry: Path) -> bool:
    return not entry.name.startswith((".", "__")) and (entry.is_dir() or entry.suffix in (".py", ".yaml"))


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error


def _run(file: Path, args: Mapping[str, Any] | Sequence[str]) -> Any:
    module = _module(file)
    function = getattr(module, "config", None)
    if not callable(function):
        hint = suggest("config", [name for name in vars(module) if not name.startswith("__")], choices="it defines")
        raise UserError(f"{file}: must define a function `config` that returns the run's config; {hint}")
    given = convert_args(function, args, str(file))
    try:
        return function(**given)
    except Exception as error:
        raise _told(error, file) from error


def _module(file: Path) -> ModuleType:
    """Run a Python file by its path. Leaves no byte code behind; private, so that it shadows nothing."""
    name = f"_mlt_config_{abs(hash(str(file.resolve()))):x}_{file.stem}"
    module = ModuleType(name)
    module.__file__ = str(file)
    try:
        code = compile(_read(file), str(file), "exec")
    except SyntaxError as error:
        line = (error.text or "").rstrip("\n")
        raise UserError(f"{file}, line {error.lineno}: {type(error).__name__}: {error.msg}\n    {line.strip()}") from error
    except ValueError as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    sys.modules[name] = module
    try:
        exec(code, module.__dict__)
    except Exception as error:
        raise _told(error, file) from error
    return module


def _told(error: Exception, file: Path) -> UserError:
    """What went wrong while a config file ran, with its line; config problems keep their report."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if frame.filename == str(file)]
    line = inside[-1] if inside else None
    where = f"{file}, line {line.lineno}" if line else str(file)
    if isinstance(error, ConfigError):
        return ConfigError(error.problems, f"{where}, {error.source}" if error.source else where)
    if isinstance(error, UserError):
        return error
    told = f"{where}: {type(error).__name__}: {error}"
    if line and line.line:
        told += f"\n    {line.line}"
    last = frames[-1] if frames else None
    if last and line and last.filename != line.filename:
        told += f"\n(raised in {last.filename}, line {last.lineno})"
    return UserError(told)
