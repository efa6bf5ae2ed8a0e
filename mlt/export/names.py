"""Names of exported tensors: one per layer and parameter, whatever the stack's scan.

`stack.period.1.sub_layers.0.mixer.query.kernel` of shape (repeats, ...) becomes `layers.L.sub_layers.0.mixer.query.kernel`
for each layer L of the stack in depth order. A table whose rows are read in 8 bits is written so: its values as float8_e4m3fn
under its name, their scales as float8_e8m0fnu under its name and `_scale`.
"""

import re
from typing import Any

import jax
import numpy as np

from mlt.model.edges import PARTS, SCANNED
from mlt.model.float8_tables import float8_names
from mlt.model.lm import LMConfig
from mlt.nn.float8 import restored, stored
from mlt.nn.param import named_leaves, path_name

_STACK = re.compile(rf"stack\.({'|'.join(PARTS)})\.(\d+)\.(.+)")
_SCANNED = tuple(f"stack.{part}." for part in SCANNED)
_SCALE = "_scale"


def layer_names(config: LMConfig, name: str) -> list[str]:
    """Exported names of a parameter: one, or one per repeat for a parameter of the period."""
    match = _STACK.fullmatch(name)
    if match is None:
        return [name]
    part, index, rest = match[1], int(match[2]), match[3]
    stack = config.stack
    first = sum(len(getattr(stack, before)) * stack.times(before) for before in PARTS[: PARTS.index(part)])
    return [f"layers.{first + repeat * len(getattr(stack, part)) + index}.{rest}" for repeat in range(stack.times(part))]


def to_tensors(config: LMConfig, model: Any) -> dict[str, np.ndarray]:
    """Every parameter and buffer of a model under its exported name."""
    tensors: dict[str, np.ndarray] = {}
    in_8_bits = float8_names(config)
    for name, leaf in named_leaves(model):
        array = np.asarray(leaf)
        names = layer_names(config, name)
        parts = array if _STACK.fullmatch(name) and name.startswith(_SCANNED) else [array]
        if name in in_8_bits:
            parts, scales = zip(*(stored(part) for part in parts), strict=True)
            tensors |= dict(zip((f"{exported}{_SCALE}" for exported in names), scales, strict=True))
        tensors |= dict(zip(names, (np.ascontiguousarray(part) for part in parts), strict=True))
    return tensors


def from_tensors(config: LMConfig, specs: Any, tensors: dict[str, np.ndarray]) -> Any:
    """A model of arrays from exported tensors; `specs` is its described tree.

    Raises:
        KeyError: a tensor is missing.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(specs)
    leaves, in_8_bits = [], float8_names(config)
    for path, _ in flat:
        name = path_name(path)
        names = layer_names(config, name)
        parts = [tensors[exported] for exported in names]
        if name in in_8_bits:
            parts = [restored(part, tensors[f"{exported}{_SCALE}"]) for part, exported in zip(parts, names, strict=True)]
        leaves.append(np.stack(parts) if name.startswith(_SCANNED) else parts[0])
    return jax.tree_util.tree_unflatten(treedef, [jax.numpy.asarray(leaf) for leaf in leaves])
