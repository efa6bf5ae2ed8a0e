"""What tokens leave behind while decoding: caches of fixed shape whose slots are told apart by segment and position."""

from typing import Any

import jax
import jax.numpy as jnp

from mlt.mixers.base import Context


def slots(max_length: int, window: int | None) -> int:
    """Slots of a cache: every token, or the `window - 1` in front of a query."""
    return max_length if window is None else min(max_length, max(window - 1, 1))


def empty_cache(batch: int, count: int, dtype: jnp.dtype, **shapes: tuple[int, ...]) -> dict[str, Any]:
    """A cache of `count` slots for arrays of these shapes a token; an empty slot has the segment of padding."""
    arrays = {name: jnp.zeros((batch, count, *shape), dtype) for name, shape in shapes.items()}
    empty = jnp.zeros((batch, count), jnp.int32)
    return {**arrays, "segment": empty, "position": empty, "length": jnp.zeros((), jnp.int32)}


def extend(
    cache: dict[str, Any], ctx: Context, *, window: int | None = None, **new: jax.Array
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Add the call's tokens to a cache.

    Args:
        cache: from `empty_cache` or the last call.
        ctx: of the call.
        window: None appends to what is there; a number keeps the last tokens only.
        new: (B, T, ...) arrays under the cache's names.

    Returns:
        What the call's tokens may look at, and the cache for the next call.
    """
    arrived = {**new, "segment": ctx.segment_ids, "position": ctx.positions}
    length = cache["length"] + ctx.segment_ids.shape[1]
    if window is None:
        place = jax.lax.dynamic_update_slice_in_dim
        seen = {name: place(cache[name], value, cache["length"], axis=1) for name, value in arrived.items()}
        return seen, {**seen, "length": length}
    count = cache["segment"].shape[1]
    seen = {name: jnp.concatenate([cache[name], value], axis=1) for name, value in arrived.items()}
    return seen, {**{name: value[:, -count:] for name, value in seen.items()}, "length": length}


def empty_picked(batch: int, count: int, dtype: jnp.dtype, **shapes: tuple[int, ...]) -> dict[str, Any]:
    """A cache for some of the tokens; every row fills its slots at a pace of its own."""
    return {**empty_cache(batch, max(count, 1), dtype, **shapes), "length": jnp.zeros((batch,), jnp.int32)}


def pick(picked_BT: jax.Array, cache: dict[str, Any], **new: jax.Array) -> dict[str, Any]:
    """Append the picked tokens of each row to a cache of `empty_picked`; what no slot is left for is dropped."""
    count = cache["segment"].shape[1]
    slot_BT = cache["length"][:, None] + jnp.cumsum(picked_BT, axis=1) - 1
    slot_BT = jnp.where(picked_BT, slot_BT, count)
    put = jax.vmap(lambda row, slot, value: row.at[slot].set(value.astype(row.dtype), mode="drop"))
    kept = {name: put(cache[name], slot_BT, value) for name, value in new.items()}
    return {**kept, "length": cache["length"] + picked_BT.sum(axis=1, dtype=jnp.int32)}
