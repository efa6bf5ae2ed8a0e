"""Portable form. The derivative of the recurrence is another one in the other direction, so it is written out.

On a CPU a loop over tokens is fastest; it works in place, on a buffer that holds b (or the cotangent of h) to begin with.
Elsewhere its latency would rule: rows are cut into chunks, each is combined by an associative scan, and only the chunks
are run one after another.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mlt_kernels import dispatch
from mlt_kernels.diagonal_recurrence._resets import Resets, resets, with_resets

CHUNK = 64
"""Tokens of a chunk of the associative form."""


def unsupported(**_: Any) -> str | None:
    return None


def run(
    *, a: Array, b: Array, initial_state: Array | None, segment_ids: Array | None, reverse: bool, state_dtype: Any
) -> tuple[Array, Array]:
    a, b = a.astype(state_dtype), b.astype(state_dtype)
    start = jnp.zeros_like(a[:, 0]) if initial_state is None else initial_state.astype(state_dtype)
    h: Any
    if dispatch.platform() == "cpu":
        h = by_tokens(a, b, start, resets(segment_ids, reverse), reverse)
    else:
        h = by_chunks(*with_resets(a, b, segment_ids, reverse), start, reverse)
    return h, h[:, 0 if reverse else -1]


def recur(a: Array, b: Array, start: Array, reverse: bool, by_association: bool) -> Array:
    """h (B, T, ...) of coefficients that hold their own resets, without a derivative: for other ops' own rules."""
    return _associative(a, b, start, reverse) if by_association else _token_loop(a, b, start, None, reverse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def by_tokens(a: Array, b: Array, start: Array, marks: Resets | None, reverse: bool) -> Array:
    """h (B, T, ...), one token after another."""
    return _token_loop(a, b, start, marks, reverse)


def _token_loop(a: Array, b: Array, start: Array, marks: Resets | None, reverse: bool) -> Array:
    """In place: `lax.scan` would first copy a and b token-major, and h back, at several times the cost."""
    T = a.shape[1]

    def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        h, states = carry
        t = T - 1 - i if reverse else i
        h = _token(_at(a, t), _at(states, t), h, marks, t)
        return h, _put(states, h, t)

    return jax.lax.fori_loop(0, T, step, (start, b))[1]


def _token(a: Array, b: Array, h: Array, marks: Resets | None, t: Array) -> Array:
    if marks is None:
        return a * h + b
    fresh, padding = (_lift(_at(mark, t), h) for mark in marks)
    return jnp.where(padding, h, a * jnp.where(fresh, 0, h) + b)


def _by_tokens_forward(
    a: Array, b: Array, start: Array, marks: Resets | None, reverse: bool
) -> tuple[Array, tuple[Array, Array, Array, Resets | None]]:
    h = _token_loop(a, b, start, marks, reverse)
    return h, (a, h, start, marks)


def _by_tokens_backward(reverse: bool, saved: Any, ct: Array) -> tuple[Any, ...]:
    """With g the cotangent of h after all its uses, g_t = ct_t + a_{t+1} g_{t+1}: the recurrence the other way."""
    a, h, start, marks = saved
    T = a.shape[1]
    first, on = (T - 1, -1) if reverse else (0, 1)

    def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        g, writes = carry
        t = i if reverse else T - 1 - i
        g = _at(writes, t) + _passed(g, jnp.clip(t + on, 0, T - 1))
        return g, _put(writes, g if marks is None else jnp.where(_lift(_at(marks[1], t), g), 0, g), t)

    def _passed(g: Array, t: Array) -> Array:
        """The part of the cotangent of h_t that goes to h_{t-1}."""
        if marks is None:
            return _at(a, t) * g
        fresh, padding = (_lift(_at(mark, t), g) for mark in marks)
        return jnp.where(padding, g, jnp.where(fresh, 0, _at(a, t) * g))

    g, db = jax.lax.fori_loop(0, T, step, (jnp.zeros_like(start), ct))
    before = [start[:, None], h[:, :-1]] if not reverse else [h[:, 1:], start[:, None]]
    da = db * jnp.concatenate(before, axis=1)
    if marks is not None:
        da = jnp.where(_lift(marks[0], da), 0, da)
    return da, db, _passed(g, jnp.int32(first)), None


by_tokens.defvjp(_by_tokens_forward, _by_tokens_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def by_chunks(a: Array, b: Array, start: Array, reverse: bool) -> Array:
    """h (B, T, ...) of coefficients that hold their own resets."""
    return _associative(a, b, start, reverse)


def _by_chunks_forward(a: Array, b: Array, start: Array, reverse: bool) -> tuple[Array, Any]:
    h = _associative(a, b, start, reverse)
    return h, (a, h, start)


def _by_chunks_backward(reverse: bool, saved: Any, ct: Array) -> tuple[Array, Array, Array]:
    a, h, start = saved
    if reverse:
        following = jnp.concatenate([jnp.zeros_like(a[:, :1]), a[:, :-1]], axis=1)
        before = jnp.concatenate([h[:, 1:], start[:, None]], axis=1)
    else:
        following = jnp.concatenate([a[:, 1:], jnp.zeros_like(a[:, :1])], axis=1)
        before = jnp.concatenate([start[:, None], h[:, :-1]], axis=1)
    g = _associative(following, ct, jnp.zeros_like(start), not reverse)
    edge = -1 if reverse else 0
    return g * before, g, a[:, edge] * g[:, edge]


by_chunks.defvjp(_by_chunks_forward, _by_chunks_backward)


def _associative(a: Array, b: Array, start: Array, reverse: bool) -> Array:
    if reverse:
        return _associative(a[:, ::-1], b[:, ::-1], start, False)[:, ::-1]
    B, T = a.shape[:2]
    pad = [(0, 0), (0, -T % CHUNK)] + [(0, 0)] * (a.ndim - 2)
    shape = (B, -1, CHUNK, *a.shape[2:])
    a_BJC, b_BJC = jnp.pad(a, pad).reshape(shape), jnp.pad(b, pad).reshape(shape)

    def combine(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        return right[0] * left[0], right[0] * left[1] + right[1]

    a_BJC, b_BJC = jax.lax.associative_scan(combine, (a_BJC, b_BJC), axis=2)
    ends = (jnp.moveaxis(a_BJC[:, :, -1], 1, 0), jnp.moveaxis(b_BJC[:, :, -1], 1, 0))
    _, entering = jax.lax.scan(lambda h, end: (end[0] * h + end[1], h), start, ends)
    h = a_BJC * jnp.moveaxis(entering, 0, 1)[:, :, None] + b_BJC
    return h.reshape(B, -1, *a.shape[2:])[:, :T]


def _at(v: Array, t: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(v, t, 1, keepdims=False, allow_negative_indices=False)


def _put(whole: Array, part: Array, t: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(whole, part, t, 1, allow_negative_indices=False)


def _lift(mark: Array, like: Array) -> Array:
    return mark.reshape(mark.shape + (1,) * (like.ndim - mark.ndim))
