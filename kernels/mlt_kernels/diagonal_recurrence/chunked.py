"""Portable form. The derivative of the recurrence is another one in the other direction, so it is written out.

On a CPU a loop over tokens is fastest. Elsewhere its latency would rule: rows are cut into chunks, each is combined by
an associative scan, and only the chunks are run one after another.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mlt_kernels import dispatch
from mlt_kernels.diagonal_recurrence._resets import with_resets

CHUNK = 64


def unsupported(**_: Any) -> str | None:
    return None


def run(
    *, a: Array, b: Array, initial_state: Array | None, segment_ids: Array | None, reverse: bool, state_dtype: Any
) -> tuple[Array, Array]:
    a, b = with_resets(a.astype(state_dtype), b.astype(state_dtype), segment_ids, reverse)
    start = jnp.zeros_like(a[:, 0]) if initial_state is None else initial_state.astype(state_dtype)
    h = recur(a, b, start, reverse, dispatch.platform() != "cpu")
    return h, h[:, 0 if reverse else -1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def recur(a: Array, b: Array, start: Array, reverse: bool, by_chunks: bool) -> Array:
    """h (B, T, ...) of coefficients that hold their own resets."""
    return (_by_chunks if by_chunks else _by_tokens)(a, b, start, reverse)


def _forward(a: Array, b: Array, start: Array, reverse: bool, by_chunks: bool) -> tuple[Array, Any]:
    h = recur(a, b, start, reverse, by_chunks)
    return h, (a, h, start)


def _backward(reverse: bool, by_chunks: bool, saved: Any, ct: Array) -> tuple[Array, Array, Array]:
    """With g the cotangent of h after all its uses, g_t = ct_t + a_{t+1} g_{t+1}: the recurrence the other way."""
    a, h, start = saved
    if reverse:
        following = jnp.concatenate([jnp.zeros_like(a[:, :1]), a[:, :-1]], axis=1)
        before = jnp.concatenate([h[:, 1:], start[:, None]], axis=1)
    else:
        following = jnp.concatenate([a[:, 1:], jnp.zeros_like(a[:, :1])], axis=1)
        before = jnp.concatenate([start[:, None], h[:, :-1]], axis=1)
    g = recur(following, ct, jnp.zeros_like(start), not reverse, by_chunks)
    edge = -1 if reverse else 0
    return g * before, g, a[:, edge] * g[:, edge]


recur.defvjp(_forward, _backward)


def _by_tokens(a: Array, b: Array, start: Array, reverse: bool) -> Array:
    """In place: `lax.scan` would first copy a and b token-major, and h back, at several times the cost."""
    T = a.shape[1]

    def at(x: Array, t: Array) -> Array:
        return jax.lax.dynamic_index_in_dim(x, t, 1, keepdims=False)

    def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        h, states = carry
        t = T - 1 - i if reverse else i
        h = at(a, t) * h + at(b, t)
        return h, jax.lax.dynamic_update_index_in_dim(states, h, t, 1)

    return jax.lax.fori_loop(0, T, step, (start, jnp.zeros_like(b)))[1]


def _by_chunks(a: Array, b: Array, start: Array, reverse: bool) -> Array:
    if reverse:
        return _by_chunks(a[:, ::-1], b[:, ::-1], start, False)[:, ::-1]
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
