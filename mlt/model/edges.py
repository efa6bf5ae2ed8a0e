"""What layers of a stack publish, read and share: which values a scan must carry, and what of it cannot be right."""

import difflib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mlt.config.base import Config
from mlt.config.problems import Problem, one_of, walk
from mlt.mixers.base import EMBEDDING, MixerConfig, Part, Published

if TYPE_CHECKING:
    from mlt.model.stack import Stack

PARTS = ("head", "period", "middle", "upper", "tail")
SCANNED = ("period", "upper")
UNROLLED = ("head", "middle", "tail")


def placed_mixers(stack: "Stack") -> Iterator[tuple[str, str, MixerConfig]]:
    """(part, path, mixer) of every mixer that the stack names, in depth order, those of a period once."""
    for part in PARTS:
        for i, block in enumerate(getattr(stack, part)):
            for j, mixer in enumerate(block.mixers):
                yield part, f"{part}[{i}].mixers[{j}]", mixer


def carried(stack: "Stack", part: str, d_model: int) -> tuple[str, ...]:
    """Values that the scan of a part hands on: published in it, read behind it. The last repeat's are what is read."""
    behind = PARTS[PARTS.index(part) + 1 :]
    made = {name for where, _, mixer in placed_mixers(stack) if where == part for name in mixer.publishes(d_model)}
    read = {name for where, _, mixer in placed_mixers(stack) if where in behind for name in mixer.reads(d_model)}
    return tuple(sorted(made & read))


def shared_parts(stack: "Stack") -> dict[str, Any]:
    """Parts whose parameters several layers use, by name: configs with a `build`."""
    return {name: part for _, _, mixer in placed_mixers(stack) for name, part in mixer.shares().items()}


def edge_problems(stack: "Stack", d_model: int) -> Iterator[Problem]:
    """Names that are read before they are published, published twice or for nobody, or that mean different things.

    Paths are relative to the stack.
    """
    known: dict[str, tuple[str, Published]] = {EMBEDDING: ("the stack", {"stream": Part((d_model,), ("stream",))})}
    everything = {name for _, _, mixer in placed_mixers(stack) for name in mixer.publishes(d_model)}
    read: set[str] = set()
    for _, path, mixer in placed_mixers(stack):
        for name, wanted in mixer.reads(d_model).items():
            read.add(name)
            yield from _reading(path, name, wanted, known, everything)
        for name, parts in mixer.publishes(d_model).items():
            if name in known:
                yield Problem(path, name, f"publishes a name that {known[name][0]} publishes", "publish it under another name")
            else:
                known[name] = (path, parts)
    for name, (path, _) in known.items():
        if name != EMBEDDING and name not in read:
            yield Problem(path, name, "publishes what no layer reads", "read it in a later layer, or publish nothing")
    yield from _shared_problems(stack)
    yield from _nested(stack, d_model)


def _nested(stack: "Stack", d_model: int) -> Iterator[Problem]:
    """Mixers inside others that do not hand on what theirs publish, read or share."""
    for _, path, outer in placed_mixers(stack):
        seen = {*outer.publishes(d_model), *outer.reads(d_model), *outer.shares()}
        for where, mixer in walk(outer, path):
            if isinstance(mixer, MixerConfig) and mixer is not outer:
                for name in sorted({*mixer.publishes(d_model), *mixer.reads(d_model), *mixer.shares()} - seen):
                    rule = f"is a name inside {type(outer).__name__}, which hands nothing on"
                    yield Problem(where, name, rule, "publish and read in mixers of a block")


def _reading(
    path: str, name: str, wanted: Published, known: dict[str, tuple[str, Published]], later: set[str]
) -> Iterator[Problem]:
    if name not in known:
        if name in later:
            rule, ways_out = "reads what only a later layer publishes", "move the layer that publishes it in front of this one"
        else:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            rule, ways_out = "reads what no layer publishes", f"{hint}in front of it there is {one_of(sorted(known))}"
        yield Problem(path, name, rule, ways_out)
        return
    source, found = known[name]
    if found != wanted:
        rule = f"reads {_text(wanted)}, but {source} publishes {_text(found)}"
        yield Problem(path, name, rule, "make them agree")


def _shared_problems(stack: "Stack") -> Iterator[Problem]:
    first: dict[str, tuple[str, Config]] = {}
    for _, path, mixer in placed_mixers(stack):
        for name, part in mixer.shares().items():
            place, other = first.setdefault(name, (path, part))
            if other != part:
                yield Problem(path, name, f"shares another {type(part).__name__} than {place} under this name", "make them equal")


def _text(parts: Published) -> str:
    sizes = {name: " x ".join(map(str, part.shape)) for name, part in parts.items()}
    return ", ".join(f"{name} of {sizes[name]}" + (f" {part.form}" if part.form else "") for name, part in parts.items())
