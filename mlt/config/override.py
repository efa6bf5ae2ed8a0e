"""`--set a.b[2].c=value`: replace leaves or nodes of a finished tree, all at once."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, TypeVar

from mlt.config.base import Config
from mlt.config.build import build
from mlt.config.dump import to_plain
from mlt.config.problems import ABSENT, ConfigError, Problem, at, collect_problems, suggest
from mlt.errors import UserError

Step = str | int
C = TypeVar("C", bound=Config)
_STEP = re.compile(r"""(?P<dot>\.)?(?P<name>[^.\[\]"]+)|\[(?P<item>-?\d+|\*|"(?:[^"\\]|\\.)*")\]""")


def apply_sets(tree: C, sets: Sequence[str], *, source: str | None = None) -> C:
    """The tree with some places replaced.

    Each of `sets` is `path=value`. The path goes by field names and item numbers (`blocks[2]`, `blocks.2`, from the
    end with `[-1]`, `[*]` for every item, `["odd key"]` in a mapping). The value is YAML: a scalar, a list, or a whole
    node as `{class: mlt.module.ClassName, field: value}`. They apply in order; of two for one place the last counts.

    Raises:
        ConfigError: every unreadable set, unknown path and refused value together, and where one is found, the broken
            rules of the rest too. The rules of the result are left to `check_tree`.
    """
    found: list[Problem] = []
    data = to_plain(tree, all_classes=True)
    for text in sets:
        _apply(data, text, found)
    try:
        result = build(data, type(tree))
    except ConfigError as error:
        raise ConfigError([*found, *error.problems], source) from None
    if found:
        raise ConfigError([*found, *collect_problems(result)], source)
    assert isinstance(result, type(tree))
    return result


def parse_path(path: str) -> list[Step] | None:
    """The steps of a path (numbers as int), or None if it cannot be read."""
    steps: list[Step] = []
    position = 0
    while position < len(path):
        match = _STEP.match(path, position)
        if match is None or (match["name"] and bool(match["dot"]) == (position == 0)):
            return None
        token = match["name"] or match["item"]
        if token.startswith('"'):
            steps.append(json.loads(token))
        else:
            steps.append(int(token) if re.fullmatch(r"-?\d+", token) else token)
        position = match.end()
    return steps or None


def _apply(data: dict[str, Any], text: str, found: list[Problem]) -> None:
    from mlt.config.text import read_yaml

    path, equals, value_text = text.partition("=")
    steps = parse_path(path.strip())
    if not equals or steps is None:
        found.append(Problem(f"--set {text}", ABSENT, "must be path=value", "for example model.stack.period[0].norm_eps=1e-6"))
        return
    try:
        value = read_yaml(value_text, f"--set {path}")
    except UserError as error:
        found.append(Problem(path.strip(), value_text, str(error)))
        return
    *above, last = steps
    for holder, where in list(_descend(data, above, "", found)):
        for step in _expand(holder, last, where, found, assign=True):
            holder[step] = deepcopy(value)


def _descend(holder: Any, steps: Sequence[Step], path: str, found: list[Problem]) -> Iterator[tuple[Any, str]]:
    if not steps:
        yield holder, path
        return
    for step in _expand(holder, steps[0], path, found, assign=False):
        yield from _descend(holder[step], steps[1:], at(path, step), found)


def _expand(holder: Any, step: Step, path: str, found: list[Problem], *, assign: bool) -> list[Any]:
    """The keys or indices of a container that a step means; a problem where there is none."""
    where = at(path, step)
    if isinstance(holder, Mapping):
        keys = [key for key in holder if key != "class"]
        if step == "*" and "class" not in holder:
            return keys
        if str(step) in holder or assign:  # the class that is built from this mapping knows its keys
            return [str(step)]
        owner = str(holder.get("class", path or "the config")).rpartition(".")[2]
        found.append(
            Problem(
                where,
                ABSENT,
                f"{owner} has no {step}",
                suggest(str(step), keys, choices="it has", list_all=True),
            )
        )
    elif isinstance(holder, list):
        count = len(holder)
        if step == "*":
            return list(range(count))
        if isinstance(step, int) and -count <= step < count:
            return [step % count]
        choices = f"use 0 to {count - 1}, -{count} to -1, or *" if count else "set the whole list"
        found.append(Problem(where, ABSENT, f"{path} is a list of {count} item{'' if count == 1 else 's'}", choices))
    elif holder is None:
        found.append(Problem(where, ABSENT, f"{path} is None, so nothing is inside", f"set {path} as a whole"))
    else:
        found.append(Problem(where, ABSENT, f"{path} is the value {holder!r}, so nothing is inside", f"set {path} itself"))
    return []
