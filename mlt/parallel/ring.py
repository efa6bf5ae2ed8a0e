"""Softmax attention over sequence shards, by the ways of `crossings.py`: keys and values travel and queries stay, or heads and
tokens change places.

The ring has a backward pass of its own: gradients of keys and values travel with them, and each step computes its part
again from the saved log-sum-exp, so that no device ever holds more than two shards of keys and values.
These functions run inside `shard_map`.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import mlt_kernels
from jax import Array
from mlt_kernels.attention import EMPTY_LSE

from mlt.parallel import crossings, sequence


@dataclasses.dataclass(frozen=True)
class Options:
    """What stays the same for every part of one call.

    Attributes:
        size: shards of the ring.
        stride: neighbours that form one shard of it.
    """

    size: int
    stride: int = 1
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    implementation: Any = None

    @property
    def devices(self) -> int:
        return self.size * self.stride

    def place(self) -> Array:
        """Number of the device's shard in the ring."""
        return sequence.index() // self.stride

    def permute(self, x: Any, moves: Any) -> Any:
        """One collective-permute from shard to shard of the ring, for each array of the tree."""
        pairs = [(a * self.stride + i, b * self.stride + i) for a, b in moves for i in range(self.stride)]
        return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, sequence.AXIS, pairs), x)

    def rotate(self, x: Any) -> Any:
        return self.permute(x, [(shard, (shard + 1) % self.size) for shard in range(self.size)])

    def attend(self, q: Array, k: Array, v: Array, segments: Any, positions: Any, **more: Any) -> Any:
        return mlt_kernels.attention(
            q,
            k,
            v,
            segment_ids=segments,
            positions=positions,
            window=self.window,
            softcap=self.softcap,
            scale=self.scale,
            implementation=self.implementation,
            **more,
        )


def attend(q: Array, k: Array, v: Array, segment_ids: Array, sinks: Array | None, strategy: str, options: Options) -> Array:
    """Causal attention of the rows whose shards these are: (B, T, N, P)."""
    run = {"gather": _gather, "window": _window}.get(strategy)
    if run is not None:
        return run(q, k, v, segment_ids, sinks, options)
    if strategy in ("heads", "heads_ring"):
        degree = options.size if strategy == "heads" else crossings.head_degree(q.shape[2], k.shape[2], options.size)
        return _heads(q, k, v, segment_ids, sinks, options, degree)
    return _round(q, k, v, segment_ids, sinks, options, zigzag=strategy == "zigzag").astype(v.dtype)


def _round(q, k, v, segment_ids, sinks, options, *, zigzag):
    inputs = (q, k, v, segment_ids)
    if zigzag:
        inputs = jax.tree.map(lambda x: _to_zigzag(x, options), inputs)
    o, lse = _ring(options, zigzag, *inputs)
    if zigzag:
        o, lse = (_from_zigzag(x, options) for x in (o, lse))
    # A sink joins the denominator once, whatever the number of parts.
    return o if sinks is None else o * jnp.exp(lse - jnp.logaddexp(lse, sinks))[..., None]


def _gather(q, k, v, segment_ids, sinks, options):
    whole = [jax.lax.all_gather(x, sequence.AXIS, axis=1, tiled=True) for x in (k, v, segment_ids)]
    positions = _positions(q.shape, sequence.offset(q.shape[1])), _positions(whole[0].shape, 0)
    return options.attend(q, whole[0], whole[1], (segment_ids, whole[2]), positions, sinks=sinks)


def _window(q, k, v, segment_ids, sinks, options):
    width = min(options.window - 1, (options.size - 1) * q.shape[1])
    keys, values, segments = sequence.with_front((k, v, segment_ids), width, options.size)
    here = sequence.offset(q.shape[1])
    positions = _positions(q.shape, here), _positions(keys.shape, here - width)
    return options.attend(q, keys, values, (segment_ids, segments), positions, sinks=sinks)


def _heads(q, k, v, segment_ids, sinks, options, degree):
    """Heads of `degree` neighbours change places with tokens; a ring joins the groups if there are several."""
    repeats = math.lcm(k.shape[2], degree) // k.shape[2]
    groups = [[start + i for i in range(degree)] for start in range(0, options.size, degree)]
    within = {"axis_name": sequence.AXIS, "axis_index_groups": groups, "tiled": True}

    def spread(x: Array) -> Array:
        """(B, T, heads, ...) -> (B, T degree, heads / degree, ...)"""
        return jax.lax.all_to_all(x, split_axis=2, concat_axis=1, **within)

    k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
    segments = jax.lax.all_gather(segment_ids, axis=1, **within)
    if sinks is not None:
        mine = q.shape[2] // degree
        sinks = jax.lax.dynamic_slice_in_dim(sinks, sequence.index() % degree * mine, mine)
    q, k, v = spread(q), spread(k), spread(v)
    if degree == options.size:
        o = options.attend(q, k, v, segments, None, sinks=sinks)
    else:
        over_groups = dataclasses.replace(options, size=options.size // degree, stride=degree)
        o = _round(q, k, v, segments, sinks, over_groups, zigzag=q.shape[1] % 2 == 0).astype(v.dtype)
    return jax.lax.all_to_all(o, split_axis=1, concat_axis=2, **within)


def _positions(shape: tuple[int, ...], start: Array | int) -> Array:
    return jnp.broadcast_to(start + jnp.arange(shape[1], dtype=jnp.int32), shape[:2])


def _halves(length: int, size: int, zigzag: bool, shard: Array) -> Array:
    """(T,) row indices of a shard's tokens."""
    tokens = jnp.arange(length, dtype=jnp.int32)
    if not zigzag:
        return shard * length + tokens
    half = length // 2
    late = (2 * size - 1 - shard) * half
    return jnp.where(tokens < half, shard * half + tokens, late + tokens - half)


def _to_zigzag(x: Array, options: Options) -> Array:
    """From tokens in order to halves d and 2 size - 1 - d of the row on shard d."""
    half, size = x.shape[1] // 2, options.size
    even = options.permute(x[:, :half], [(d, _home(2 * d, size)) for d in range(size)])
    odd = options.permute(x[:, half:], [(d, _home(2 * d + 1, size)) for d in range(size)])
    early_is_even = options.place() % 2 == 0
    early, late = jnp.where(early_is_even, even, odd), jnp.where(early_is_even, odd, even)
    return jnp.concatenate([early, late], axis=1)


def _from_zigzag(x: Array, options: Options) -> Array:
    half, size = x.shape[1] // 2, options.size
    early, late = x[:, :half], x[:, half:]
    early_is_even = options.place() % 2 == 0
    even, odd = jnp.where(early_is_even, early, late), jnp.where(early_is_even, late, early)
    first = options.permute(even, [(_home(2 * d, size), d) for d in range(size)])
    second = options.permute(odd, [(_home(2 * d + 1, size), d) for d in range(size)])
    return jnp.concatenate([first, second], axis=1)


def _home(piece: int, size: int) -> int:
    """Shard that holds a half shard of the row in zigzag order."""
    return piece if piece < size else 2 * size - 1 - piece


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(options: Options, zigzag: bool, q: Array, k: Array, v: Array, segment_ids: Array) -> tuple[Array, Array]:
    """(o, lse) in float32 of this shard's queries over all keys."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    start = (jnp.zeros((*q.shape[:3], v.shape[3]), wide), jnp.full(q.shape[:3], EMPTY_LSE, wide))

    def step(carry, hop):
        travelling, (o, lse) = carry
        part = _part(options, zigzag, hop, q, segment_ids, travelling)
        merged = jnp.logaddexp(lse, part[1])
        o = jnp.exp(lse - merged)[..., None] * o + jnp.exp(part[1] - merged)[..., None] * part[0]
        return (options.rotate(travelling), (o, merged)), None

    return jax.lax.scan(step, ((k, v, segment_ids), start), jnp.arange(options.size))[0][1]


def _ring_fwd(options, zigzag, q, k, v, segment_ids):
    o, lse = _ring(options, zigzag, q, k, v, segment_ids)
    return (o, lse), (q, k, v, segment_ids, o, lse)


def _ring_bwd(options, zigzag, saved, cotangents):
    q, k, v, segment_ids, o, lse = saved
    do, dlse = cotangents

    def step(carry, hop):
        (k, v, segments, dk, dv), dq = carry

        def part_of(q, k, v):
            return _part(options, zigzag, hop, q, segment_ids, (k, v, segments))

        (part_o, part_lse), pull = jax.vjp(part_of, q, k, v)
        # o = sum_i exp(lse_i - lse) o_i and lse = log sum_i exp(lse_i), differentiated in (o_i, lse_i).
        weight = jnp.exp(part_lse - lse)
        inner = jnp.sum(do * (part_o - o), axis=-1) + dlse
        grads = pull(((weight[..., None] * do).astype(part_o.dtype), (weight * inner).astype(part_lse.dtype)))
        dq, dk, dv = (total + grad.astype(total.dtype) for total, grad in zip((dq, dk, dv), grads, strict=True))
        return (options.rotate((k, v, segments, dk, dv)), dq), None

    wide = o.dtype
    zeros = [jnp.zeros(x.shape, wide) for x in (q, k, v)]
    start = ((k, v, segment_ids, zeros[1], zeros[2]), zeros[0])
    ((_, _, _, dk, dv), dq), _ = jax.lax.scan(step, start, jnp.arange(options.size))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_ring.defvjp(_ring_fwd, _ring_bwd)


def _part(options: Options, zigzag: bool, hop: Array, q: Array, segment_ids: Array, travelling: Any) -> tuple[Array, Array]:
    """(o, lse) in float32 of the queries over the keys that are here at step `hop`; only pairs that a mask may let see."""
    k, v, key_segments = travelling
    size, length = options.size, q.shape[1]
    here = options.place()
    source = (here - hop) % size
    wide = jnp.promote_types(q.dtype, jnp.float32)
    query_rows, key_rows = _halves(length, size, zigzag, here), _halves(length, size, zigzag, source)

    def piece(queries: slice, keys: slice) -> tuple[Array, Array]:
        rows = [jnp.broadcast_to(x, (q.shape[0], x.shape[0])) for x in (query_rows[queries], key_rows[keys])]
        o, lse = options.attend(
            q[:, queries],
            k[:, keys],
            v[:, keys],
            (segment_ids[:, queries], key_segments[:, keys]),
            tuple(rows),
            return_lse=True,
        )
        return o.astype(wide), lse.astype(wide)

    def nothing(queries: int) -> tuple[Array, Array]:
        shape = (q.shape[0], queries, q.shape[2])
        return jnp.zeros((*shape, v.shape[3]), wide), jnp.full(shape, EMPTY_LSE, wide)

    everything = slice(None)

    def own():
        return piece(everything, everything)

    def from_the_left():
        return piece(everything, slice(0, length // 2) if zigzag else everything)

    def from_the_right():
        if not zigzag:
            return nothing(length)
        late = piece(slice(length // 2, None), everything)
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), nothing(length // 2), late)

    case = jnp.where(source == here, 0, jnp.where(source < here, 1, 2))
    return jax.lax.switch(case, (own, from_the_left, from_the_right))
