"""How evenly a step's tokens went to the experts, layer by layer: metrics from the counts that the mixers report."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from mlt.model.edges import PARTS, SCANNED
from mlt.model.stack import Stack


def load_metrics(stack: Stack, aux: Any) -> dict[str, jax.Array]:
    """Scalars from the loads of every mixture of experts, over all tokens of the step.

    `aux/max_violation` is the fullest expert's load over the mean, minus 1 (MaxVio of arXiv 2408.15664), and
    `aux/load_entropy` the entropy of the loads over that of an even load, both means over layers;
    `router/LAYER/max_violation` is that of one layer, named as its parameters are in an export. `aux/dropped_share` is the
    part of all (token, expert) pairs that found no room, where layers have a capacity.

    Args:
        aux: what the stack's call reported, its counts summed over the step; parts that were not run may be missing.
    """
    loads, dropped = (dict(_counts(stack, aux, name)) for name in ("load", "dropped"))
    if not loads:
        return {}
    violations = {names: _violation(load_RE) for names, load_RE in loads.items()}
    entropies = [_entropy(load_RE) for load_RE in loads.values()]
    metrics = {"aux/max_violation": _mean(list(violations.values())), "aux/load_entropy": _mean(entropies)}
    for names, value_R in violations.items():
        metrics |= {f"router/{name}/max_violation": value_R[repeat] for repeat, name in enumerate(names)}
    if dropped:
        total = sum(loads[names].sum() for names in dropped)
        metrics["aux/dropped_share"] = sum(count_R.sum() for count_R in dropped.values()) / jnp.maximum(total, 1)
    return metrics


def _counts(stack: Stack, aux: Any, name: str) -> Iterator[tuple[tuple[str, ...], jax.Array]]:
    """(names of the layers, their `count/<name>`) of each mixer that the stack names; several layers are repeats of it."""
    depth = 0
    for part in PARTS:
        blocks, repeats = getattr(stack, part), range(stack.times(part))
        for path, leaf in jax.tree_util.tree_leaves_with_path(aux.get(part, ())):
            kind, found, *inside = path[-1].key.split("/")
            if (kind, found) != ("count", name):
                continue
            below = f"sub_layers.{path[1].idx}" + "".join(f".mixers.{number}" for number in reversed(inside))
            layers = tuple(f"layers.{depth + repeat * len(blocks) + path[0].idx}.{below}" for repeat in repeats)
            # Products with the number of experts, and sums over layers, may not fit the counts' 32 bits.
            counts = leaf.astype(jnp.float32)
            yield layers, counts if part in SCANNED else counts[None]
        depth += len(repeats) * len(blocks)


def _violation(load_RE: jax.Array) -> jax.Array:
    """(R,), 0 without tokens."""
    total_R = load_RE.sum(-1)
    return load_RE.max(-1) * load_RE.shape[-1] / jnp.maximum(total_R, 1) - (total_R > 0)


def _entropy(load_RE: jax.Array) -> jax.Array:
    """(R,), 1 for a single expert."""
    if load_RE.shape[-1] == 1:
        return jnp.ones(load_RE.shape[0])
    share_RE = load_RE / jnp.maximum(load_RE.sum(-1, keepdims=True), 1)
    return -jax.scipy.special.xlogy(share_RE, share_RE).sum(-1) / math.log(load_RE.shape[-1])


def _mean(values: list[jax.Array]) -> jax.Array:
    return jnp.mean(jnp.concatenate(values))
