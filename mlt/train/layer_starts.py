"""Layers of a new model that start from chosen layers of another: first ones, every second one, in whatever part they stand."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mlt.config.problems import Problem
from mlt.model.edges import PARTS, SCANNED
from mlt.model.lm import LM
from mlt.model.stack import Stack
from mlt.nn.param import named_leaves
from mlt.train.distill import Distill

Place = tuple[str, int | None]
"""(prefix of the names of a block's parameters, its repeat where they are stacked)."""


def layer_problems(distill: Distill, own: Stack, other: Stack) -> Iterator[Problem]:
    """What is wrong with the layers to start from, with paths in `Distill`."""
    layers = distill.layers or ()
    if len(layers) != own.num_layers:
        yield Problem(
            "layers", layers, f"has {len(layers)} numbers, and this model has {own.num_layers} layers", "name one for each"
        )
        return
    for i, layer in enumerate(layers):
        if not -1 <= layer < other.num_layers:
            rule = f"is no layer of the run that is started from: it has {other.num_layers}"
            yield Problem(f"layers[{i}]", layer, rule, f"use 0 to {other.num_layers - 1}, or -1 to draw this layer")
    for prefix, numbers in _repeats(own).items():
        drawn = [number for number in numbers if layers[number] < 0]
        if drawn and len(drawn) < len(numbers):
            rule = f"is -1, and other repeats of {prefix[:-1]} start from a layer: they are one array"
            yield Problem(f"layers[{drawn[0]}]", -1, rule, "start all of them from layers, or none")


def of_layers(layers: tuple[int, ...], specs: LM, other: LM, places: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Arrays of another model by the names that they have in a new one.

    Args:
        layers: as `Distill` has them.
        specs: the new model; an array that it wants in another shape is left out.
        places: shardings of its parameters, by name.
    """
    theirs, found = dict(named_leaves(other)), {}
    sources = _places(other.config.stack)
    repeats = _repeats(specs.config.stack)
    for name, spec in named_leaves(specs):
        prefix = next((prefix for prefix in repeats if name.startswith(prefix)), None)
        if prefix is None:
            if name in theirs:
                found[name] = theirs[name]
            continue
        chosen = [layers[number] for number in repeats[prefix]]
        wanted = [(f"{sources[layer][0]}{name.removeprefix(prefix)}", sources[layer][1]) for layer in chosen if layer >= 0]
        stacked, shape = _stacked(prefix), spec.shape[1:] if _stacked(prefix) else spec.shape
        fits = all(source in theirs and theirs[source].shape[repeat is not None :] == shape for source, repeat in wanted)
        if len(wanted) == len(chosen) and fits:
            found[name] = _put([theirs[source] for source, _ in wanted], [repeat for _, repeat in wanted], stacked, places[name])
    return found


def _put(arrays: list[jax.Array], repeats: list[int | None], stacked: bool, place: Any) -> jax.Array:
    def run(arrays: list[jax.Array]) -> jax.Array:
        parts = [array if repeat is None else array[repeat] for array, repeat in zip(arrays, repeats, strict=True)]
        return jnp.stack(parts) if stacked else parts[0]

    return jax.jit(run, out_shardings=place)(arrays)


def _stacked(prefix: str) -> bool:
    return prefix.split(".")[1] in SCANNED


def _repeats(stack: Stack) -> dict[str, list[int]]:
    """Numbers of the layers whose parameters have names with a prefix, in the order of their repeats."""
    found: dict[str, list[int]] = {}
    for number, (prefix, _) in enumerate(_places(stack)):
        found.setdefault(prefix, []).append(number)
    return found


def _places(stack: Stack) -> list[Place]:
    """Where each layer's parameters are, in depth order."""
    return [
        (f"stack.{part}.{i}.", repeat if part in SCANNED else None)
        for part in PARTS
        for repeat in range(stack.times(part))
        for i in range(len(getattr(stack, part)))
    ]
