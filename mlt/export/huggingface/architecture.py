"""What the map of an architecture is, and how layers are folded into a stack."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mlt.export.huggingface.fields import Fields
from mlt.export.huggingface.links import Link, Tensors
from mlt.mixers.base import MixerConfig
from mlt.mixers.channel.moe import MoE
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.mamba2 import Mamba2
from mlt.mixers.sequence.parallel import Parallel
from mlt.mixers.sequence.zamba import ZambaLayer
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import MAX_UNROLLED, Stack


class Unfit(Exception):
    """An architecture cannot express a config of ours; says why."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One architecture of transformers, both ways.

    Attributes:
        model_type: of config.json.
        class_name: of the model class, for `architectures` in config.json.
        read: config.json to our config.
        write: our config to the fields of config.json that `read` takes; whether they say all of it is checked by
            reading them back. Raises Unfit where the model has another form.
        links: the tensors.
        spellings: (pattern, replacement) of tensor names that some files spell otherwise.
    """

    model_type: str
    class_name: str
    read: Callable[[Fields], LMConfig]
    write: Callable[[LMConfig], dict[str, Any]]
    links: Callable[[LMConfig], Iterator[Link]]
    spellings: tuple[tuple[str, str], ...] = ()

    def respelled(self, tensors: Tensors) -> Tensors:
        """The tensors under the names that `links` knows."""
        for pattern, replacement in self.spellings:
            tensors = {re.sub(pattern, replacement, name): array for name, array in tensors.items()}
        return tensors


def stack_of(layers: Sequence[Block]) -> Stack:
    """The stack with the fewest blocks to compile: a head, a repeated period, a tail."""
    kinds = {block: number for number, block in enumerate(dict.fromkeys(layers))}
    numbers = [kinds[block] for block in layers]
    count = len(numbers)
    best, chosen = count if count <= MAX_UNROLLED else count + MAX_UNROLLED, (0, count, 1)
    for head in range(min(count, MAX_UNROLLED + 1)):
        for period in range(1, (count - head) // 2 + 1):
            repeats = 1
            first = numbers[head : head + period]
            while numbers[head + repeats * period : head + (repeats + 1) * period] == first:
                repeats += 1
            tail = count - head - repeats * period
            if repeats > 1 and tail <= MAX_UNROLLED and head + period + tail < best:
                best, chosen = head + period + tail, (head, period, repeats)
    head, period, repeats = chosen
    end = head + period * repeats
    return Stack(head=tuple(layers[:head]), period=tuple(layers[head : head + period]), repeats=repeats, tail=tuple(layers[end:]))


def same_function(a: LMConfig, b: LMConfig, other: str = "read back as") -> list[str]:
    """What differs between two configs in the function they describe, one line each; how they train does not count."""
    lines = []
    for name in LMConfig.model_fields:
        if name not in ("stack", "embed_std") and getattr(a, name) != getattr(b, name):
            lines.append(f"{name} = {getattr(a, name)!r}, {other} {getattr(b, name)!r}")
    if a.stack.hyper_connections != b.stack.hyper_connections:
        lines.append(f"stack.hyper_connections = {a.stack.hyper_connections!r}, {other} {b.stack.hyper_connections!r}")
    ours, theirs = a.stack.layers(), b.stack.layers()
    if len(ours) != len(theirs):
        return [*lines, f"{len(ours)} layers, {other} {len(theirs)}"]
    names = _shared_names(a), _shared_names(b)
    for number, pair in enumerate(zip(ours, theirs, strict=True)):
        plain, again = (
            block.replace(mixers=tuple(_plain(mixer, a.d_model, shared) for mixer in block.mixers))
            for block, shared in zip(pair, names, strict=True)
        )
        if plain == again:
            continue
        here = [name for name in Block.model_fields if name != "mixers" and getattr(plain, name) != getattr(again, name)]
        lines += [f"layer {number}: {name} = {getattr(plain, name)!r}, {other} {getattr(again, name)!r}" for name in here]
        if plain.mixers != again.mixers:
            lines.append(f"layer {number}: {_text(plain.mixers)}, {other} {_text(again.mixers)}")
    return lines


def every(layers: Sequence[Block], kind: type[MixerConfig]) -> list[Any]:
    """The mixers of one class, in depth order."""
    return [mixer for block in layers for mixer in block.mixers if isinstance(mixer, kind)]


def first(layers: Sequence[Block], kind: type[MixerConfig]) -> Any:
    """The first mixer of a class.

    Raises:
        Unfit: there is none.
    """
    found = every(layers, kind)
    if not found:
        raise Unfit(f"it has no {kind.__name__}")
    return found[0]


def _shared_names(config: LMConfig) -> dict[str, str]:
    """What several layers share, under names that its order alone decides."""
    names = dict.fromkeys(name for mixer in config.stack.mixers() for name in mixer.shares())
    return {name: f"shared_{number}" for number, name in enumerate(names)}


def _plain(mixer: MixerConfig, d_model: int, names: Mapping[str, str]) -> MixerConfig:
    """A mixer with its defaults spelled out and without what changes no output: backend, losses, the router's pace and room."""
    changes: dict[str, Any] = {name: None for name in ("kernel", "exchange") if name in type(mixer).model_fields}
    for field, meant in (("num_kv_heads", "kv_heads"), ("num_key_heads", "key_heads"), ("value_dim", "values")):
        if field in type(mixer).model_fields and hasattr(mixer, meant):
            changes[field] = getattr(mixer, meant)
    for field, meant in (("inner", "channels"), ("width", "channels"), ("step_rank", "rank")):
        if field in type(mixer).model_fields and hasattr(mixer, meant):
            changes[field] = getattr(mixer, meant)(d_model)
    if isinstance(mixer, MoE):
        changes |= dict.fromkeys(("balance_loss", "global_balance_loss", "z_loss"), 0.0)
        changes |= {"bias_update_rate": None, "capacity_factor": None}
        if mixer.num_shared_experts:
            changes |= {"num_shared_experts": 1, "shared_d_ff": mixer.shared_width}
    if isinstance(mixer, Attention) and mixer.scale is None:
        changes["scale"] = mixer.head_dim**-0.5
    if isinstance(mixer, Mamba2) and mixer.projection_scales is None:
        changes["projection_scales"] = (1.0,) * 5
    if isinstance(mixer, Parallel):
        changes["mixers"] = tuple(_plain(inner, d_model, names) for inner in mixer.mixers)
        for name in ("input_scales", "output_scales"):
            changes[name] = getattr(mixer, name) or (1.0,) * len(mixer.mixers)
    if isinstance(mixer, ZambaLayer):
        transformer = mixer.transformer.replace(num_kv_heads=mixer.transformer.kv_heads)
        changes |= {"name": names[mixer.name], "transformer": transformer, "memory": _plain(mixer.memory, d_model, names)}
    return mixer.replace(**changes)


def _text(mixers: Sequence[MixerConfig]) -> str:
    return " + ".join(repr(mixer) for mixer in mixers)
