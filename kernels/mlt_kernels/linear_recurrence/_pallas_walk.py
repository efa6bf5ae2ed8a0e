"""Walks over the chunks of a row inside a Pallas-Triton kernel, with what happens between groups of chunks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mlt_kernels.linear_recurrence._pallas_tools import Refs

Step = Callable[[Array, Any], Any]


class Groups(NamedTuple):
    """Chunks told off in groups: `number` of them, and the first chunk of a group and the one after its last."""

    number: int
    bounds: Callable[[Array], tuple[Array, Array]]


def groups(chunks: int, stride: int) -> Groups:
    """Groups of `stride` chunks, the last one perhaps shorter."""
    number = -(-chunks // stride)
    return Groups(number, lambda n: (n * stride, jnp.minimum(n * stride + stride, chunks)))


def groups_between_last(chunks: int, stride: int) -> Groups:
    """Groups that begin with the last chunk of each of `groups`, and before them one that may be empty."""
    number = -(-chunks // stride)

    def bounds(n: Array) -> tuple[Array, Array]:
        low = jnp.maximum(jnp.minimum(n * stride, chunks) - 1, 0)
        # One more at the very end, where nothing is left out.
        return low, jnp.minimum(n * stride + stride, chunks) - 1 + jax.lax.div(n, jnp.array(number, n.dtype))

    return Groups(number + 1, bounds)


def walk(
    chunks: int,
    chunk: Step,
    carry: Any,
    *,
    by: Groups | None = None,
    before: Step | None = None,
    after: Step | None = None,
    reverse: bool = False,
) -> Any:
    """Takes `carry` through every chunk; through `before` and `after` as it comes to a group (by number) and leaves it."""

    def through(low: Any, high: Any, carry: Any) -> Any:
        def step(i: Array, carry: Any) -> Any:
            return chunk(high - 1 - (i - low) if reverse else i, carry)

        return jax.lax.fori_loop(low, high, step, carry)

    if by is None or (before is None and after is None):
        return through(0, chunks, carry)

    def group(i: Array, carry: Any) -> Any:
        n = by.number - 1 - i if reverse else i
        carry = carry if before is None else before(n, carry)
        carry = through(*by.bounds(n), carry)
        return carry if after is None else after(n, carry)

    return jax.lax.fori_loop(0, by.number, group, carry)


def initial(refs: Refs, name: str, shape: tuple[int, int]) -> Array:
    """The state that a walk begins with, zeros unless the call has one of this name."""
    return refs[name][...] if name in refs else jnp.zeros(shape, jnp.float32)
