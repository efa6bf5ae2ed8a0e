"""A model cut behind some of its layers, to look at the stream there."""

from typing import Any

import jax
from flax import nnx

from mlt.model.edges import PARTS, SCANNED, carried
from mlt.model.lm import LM

_TIMES = {"period": "repeats", "upper": "upper_repeats"}


def first_layers(model: LM, count: int) -> LM:
    """The model with its first `count` layers alone: they compute what they computed, from the same arrays.

    Norm and head are the whole model's. Where a period is cut inside a repeat, the layers of that repeat follow it, unrolled.

    Raises:
        ValueError: it has fewer layers.
    """
    config = model.config.stack
    if not 0 <= count <= config.num_layers:
        raise ValueError(f"a model of {config.num_layers} layers has no first {count}")
    blocks: dict[str, Any] = dict.fromkeys(PARTS, ())
    modules: dict[str, list[Any]] = {part: [] for part in PARTS}
    times: dict[str, int] = {}
    for place, part in enumerate(PARTS):
        own, held = getattr(config, part), list(getattr(model.stack, part))
        if part not in SCANNED:
            taken = min(count, len(own))
            blocks[part] += own[:taken]
            modules[part] += held[:taken]
            count -= taken
            continue
        repeats, rest = divmod(min(count, len(own) * config.times(part)), max(len(own), 1))
        count -= repeats * len(own) + rest
        times[_TIMES[part]] = max(repeats, 1)
        if repeats:
            blocks[part] = own
            modules[part] = [jax.tree.map(lambda leaf, n=repeats: leaf[:n], module) for module in held]
        if rest:
            behind = PARTS[place + 1]
            blocks[behind] = own[:rest]
            modules[behind] = [jax.tree.map(lambda leaf, n=repeats: leaf[n], module) for module in held[:rest]]
    return _with(model, config.replace(**blocks, **times), modules)


def _with(model: LM, stack: Any, modules: dict[str, list[Any]]) -> LM:
    new: Any = jax.tree.map(lambda leaf: leaf, model)
    new.config = model.config.replace(stack=stack)
    new.stack.config = stack
    new.stack.carried = tuple((part, carried(stack, part, model.config.d_model)) for part in SCANNED)
    for part, held in modules.items():
        setattr(new.stack, part, nnx.List(held))
    return new
