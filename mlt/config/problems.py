"""What is wrong with a config: one problem, the report of all of them, the walk that collects them, and their wording."""

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from pydantic import BaseModel

from mlt.errors import UserError


class _Absent:
    def __repr__(self) -> str:
        return "absent"


ABSENT: Final = _Absent()
"""The value of a problem that has none, such as a missing field."""


@dataclass(frozen=True)
class Problem:
    """One broken rule.

    Attributes:
        path: where, such as `model.blocks[2].mixer.num_kv_heads`; relative to the class that states the rule.
        value: what was found there, or ABSENT.
        rule: what must hold, with the numbers it depends on: "must divide num_heads = 8".
        ways_out: what to do about it: "use 1, 2, 4 or 8".
    """

    path: str
    value: Any
    rule: str
    ways_out: str | None = None

    def under(self, prefix: str) -> "Problem":
        """The same problem seen from further up the tree."""
        return replace(self, path=join(prefix, self.path))

    def __str__(self) -> str:
        shown = "" if self.value is ABSENT else f" = {shorten(self.value)}"
        tail = f"; {self.ways_out}" if self.ways_out else ""
        return f"{self.path or 'config'}{shown}: {self.rule}{tail}"


class ConfigError(UserError):
    """All problems of a config in one numbered report.

    Attributes:
        problems: tuple of Problem.
        source: the file or class they were found in, if known.
    """

    def __init__(self, problems: Iterable[Problem], source: str | None = None):
        self.problems = tuple(problems)
        self.source = source
        super().__init__(self.problems, source)

    def __str__(self) -> str:
        count = len(self.problems)
        head = f"{count} config problem{'' if count == 1 else 's'}{f' in {self.source}' if self.source else ''}:"
        return "\n".join([head, *(f"  {number}. {problem}" for number, problem in enumerate(self.problems, 1))])


def walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every config node of a tree with its path, parents before children."""
    if isinstance(value, BaseModel):
        yield path, value
        for name in type(value).model_fields:
            yield from walk(getattr(value, name), at(path, name))
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from walk(item, at(path, index))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from walk(item, at(path, key))


def collect_problems(tree: Any, path: str = "") -> list[Problem]:
    """The broken rules of all nodes of a tree (or of a tuple or mapping of trees), paths starting at `path`.

    A rule that crashes is taken for a consequence of the other problems, and raises only where there are none.
    """
    found: list[Problem] = []
    crash: Exception | None = None
    for where, node in walk(tree, path):
        try:
            for problem in node.problems():  # every node is a Config
                found.append(problem.under(where))
        except Exception as error:
            crash = crash or error
    if crash and not found:
        raise crash
    return found


def check_tree(tree: Any, source: str | None = None) -> None:
    """Raise one ConfigError with every broken rule of the tree, if there is any."""
    found = collect_problems(tree)
    if found:
        raise ConfigError(found, source)


def join(prefix: str, path: str) -> str:
    """`a` and `b[0]` make `a.b[0]`; `a` and `[0]` make `a[0]`."""
    if not prefix or not path or path.startswith("["):
        return prefix + path
    return f"{prefix}.{path}"


def at(path: str, step: str | int) -> str:
    """The path one step further down: a field or plain key with a dot, an index or odd key in brackets."""
    if isinstance(step, int):
        return f"{path}[{step}]"
    plain = re.fullmatch(r"[A-Za-z_][\w-]*", step)
    return join(path, step) if plain else f"{path}[{json.dumps(step, ensure_ascii=False)}]"


def one_of(names: Iterable[Any]) -> str:
    """`a, b or c`."""
    *most, last = map(str, names)
    return f"{', '.join(most)} or {last}" if most else last


def near(name: str, options: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """Up to three of the options that are about as near as the nearest; neither case nor the order of words counts."""

    def words(text: str) -> str:
        return "_".join(sorted(text.lower().split("_")))

    def closeness(option: str) -> float:
        whole = difflib.SequenceMatcher(None, name.lower(), option.lower()).ratio()
        return max(whole, difflib.SequenceMatcher(None, words(name), words(option)).ratio())

    scores = {option: closeness(option) for option in options}
    floor = max(cutoff, max(scores.values(), default=0.0) - 0.2)
    return sorted((option for option, score in scores.items() if score >= floor), key=lambda option: -scores[option])[:3]


def suggest(name: str, options: Iterable[str], *, choices: str = "valid keys", list_all: bool = False) -> str:
    """`did you mean x?` where an option is near, else (or with list_all: besides) the list of all options."""
    options = list(options)
    found = near(name, options)
    guess = f"did you mean {one_of(found)}?" if found else ""
    listing = f"{choices}: {', '.join(options) if options else 'none'}"
    if not guess:
        return listing
    return f"{guess} {listing}" if list_all else guess


def shorten(value: Any, limit: int = 80) -> str:
    """The value on one line of at most `limit` characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
