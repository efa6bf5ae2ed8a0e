"""Portable form: the states of one chunk of tokens at a time, and of the rest only those at chunk borders.

The decays of a chunk are one vectorized `exp`, which a loop over tokens could not give; the recurrence inside the chunk
is `diagonal_recurrence`'s. The backward pass keeps the state in front of every chunk and makes the others again.
Inside, states lie channels last: (B, C, N, D) for a chunk of C tokens.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mlt_kernels import dispatch
from mlt_kernels.diagonal_recurrence.chunked import recur
from mlt_kernels.segments import starts

CHUNKS = (16, 64)
"""Fewest and most tokens of a chunk. Fewer would keep more border states, more would only leave the cache."""
CHUNK_STATES = 1 << 17
"""States that one chunk should hold at most."""


def unsupported(**_: Any) -> str | None:
    return None


def run(
    *,
    x: Array,
    step: Array,
    A: Array,
    B: Array,
    C: Array,
    skip: Array | None,
    initial_state: Array | None,
    segment_ids: Array | None,
    state_dtype: Any,
) -> tuple[Array, Array]:
    (batch, T, D), N = x.shape, A.shape[1]
    chunk = chunk_size(batch * N * D)
    keep_BT = jnp.ones((batch, T), state_dtype)
    real_BT1 = None
    if segment_ids is not None:
        real_BT1 = (segment_ids != 0)[..., None]
        keep_BT = jnp.where(starts(segment_ids), 0, keep_BT)
        # A step of zero is a decay of one and no write.
        step, B, C = (jnp.where(real_BT1, v, jnp.zeros((), v.dtype)) for v in (step, B, C))
    state_BDN = jnp.zeros((batch, D, N), state_dtype) if initial_state is None else initial_state.astype(state_dtype)
    tokens = tuple(_pad(v, -T % chunk) for v in (x, step, B, C))
    keep_BT = jnp.pad(keep_BT, [(0, 0), (0, -T % chunk)], constant_values=1)
    by_association = dispatch.platform() != "cpu"
    found: Any = scan(tokens, A.T.astype(state_dtype), keep_BT, jnp.swapaxes(state_BDN, 1, 2), chunk, by_association)
    y, final_BND = found
    y = y[:, :T]
    if skip is not None:
        direct = skip.astype(state_dtype) * x.astype(state_dtype)
        y = y + (direct if real_BT1 is None else jnp.where(real_BT1, direct, 0))
    return y.astype(x.dtype), jnp.swapaxes(final_BND, 1, 2)


def chunk_size(states: int) -> int:
    """Tokens of a chunk, a power of two, for so many states a token."""
    least, most = CHUNKS
    size = most
    while size > least and size * states > CHUNK_STATES:
        size //= 2
    return size


Tokens = tuple[Array, Array, Array, Array]
"""x, step (B, T, D), B, C (B, T, N)."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def scan(tokens: Tokens, A_ND: Array, keep_BT: Array, state_BND: Array, chunk: int, by_association: bool) -> tuple[Array, Array]:
    """(y (B, T, D), final state (B, N, D)) of whole chunks; `keep` is 0 where a document starts, else 1."""
    y, final, _ = _forward_loop(tokens, A_ND, keep_BT, state_BND, chunk, by_association, keep_borders=False)
    return y, final


def _forward(
    tokens: Tokens, A_ND: Array, keep_BT: Array, state_BND: Array, chunk: int, by_association: bool
) -> tuple[tuple[Array, Array], Any]:
    y, final, borders = _forward_loop(tokens, A_ND, keep_BT, state_BND, chunk, by_association, keep_borders=True)
    return (y, final), (tokens, A_ND, keep_BT, borders)


def _forward_loop(
    tokens: Tokens, A_ND: Array, keep_BT: Array, state_BND: Array, chunk: int, by_association: bool, *, keep_borders: bool
) -> tuple[Array, Array, Array | None]:
    batch, T = keep_BT.shape
    chunks = T // chunk

    def body(j: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        state_BND, y_BTD, borders_JBND = carry
        if borders_JBND is not None:
            borders_JBND = jax.lax.dynamic_update_index_in_dim(borders_JBND, state_BND, j, 0)
        part = _chunk(tokens, keep_BT, j, chunk, A_ND.dtype)
        _, h_BCND = _states(part, A_ND, state_BND, by_association)
        y_BCD = _dot("bcnd,bcn->bcd", h_BCND, part[3])
        return h_BCND[:, -1], _put(y_BTD, y_BCD, j), borders_JBND

    borders = jnp.zeros((chunks, *state_BND.shape), A_ND.dtype) if keep_borders else None
    y_BTD = jnp.zeros((batch, T, A_ND.shape[1]), A_ND.dtype)
    final, y, borders = jax.lax.fori_loop(0, chunks, body, (state_BND, y_BTD, borders))
    return y, final, borders


def _backward(chunk: int, by_association: bool, saved: Any, cts: tuple[Array, Array]) -> tuple[Any, ...]:
    """With g_t the cotangent of h_t after all its uses, g_t = C_t dy_t + decay_{t+1} g_{t+1}."""
    tokens, A_ND, keep_BT, borders_JBND = saved
    dy_BTD, entering_BND = cts
    chunks = borders_JBND.shape[0]

    def body(i: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        behind_BND, dA_ND, grads = carry
        j = chunks - 1 - i
        part = _chunk(tokens, keep_BT, j, chunk, A_ND.dtype)
        x, step, B, C, _ = part
        start_BND = jax.lax.dynamic_index_in_dim(borders_JBND, j, 0, keepdims=False)
        decay, h = _states(part, A_ND, start_BND, by_association)
        dy = jax.lax.dynamic_slice_in_dim(dy_BTD, j * chunk, chunk, 1)
        g, dlog, behind_BND = _cotangents(decay, h, C, dy, start_BND, behind_BND, by_association)
        write = _dot("bcnd,bcn->bcd", g, B)
        dstep = sum((dlog[:, :, n] * A_ND[n] for n in range(A_ND.shape[0])), write * x)
        dB = _dot("bcnd,bcd->bcn", g, step * x)
        dC = _dot("bcnd,bcd->bcn", h, dy)
        by_token = (dlog * step[:, :, None]).reshape(-1, A_ND.size)
        dA_ND = dA_ND + _dot("t,tk->k", jnp.ones_like(by_token[:, 0]), by_token).reshape(A_ND.shape)
        new = (write * step, dstep, dB, dC)
        return behind_BND, dA_ND, tuple(_put(v, n, j) for v, n in zip(grads, new, strict=True))

    zeros = tuple(jnp.zeros(v.shape, v.dtype) for v in tokens)
    state, dA, grads = jax.lax.fori_loop(0, chunks, body, (entering_BND, jnp.zeros_like(A_ND), zeros))
    return grads, dA, jnp.zeros_like(keep_BT), state


scan.defvjp(_forward, _backward)


def _chunk(tokens: Tokens, keep_BT: Array, j: Array, chunk: int, dtype: Any) -> tuple[Array, ...]:
    """x, step, B, C, keep of chunk j, in `dtype`."""
    return tuple(jax.lax.dynamic_slice_in_dim(v, j * chunk, chunk, 1).astype(dtype) for v in (*tokens, keep_BT))


def _states(part: tuple[Array, ...], A_ND: Array, state_BND: Array, by_association: bool) -> tuple[Array, Array]:
    """Decays and states (B, C, N, D) of one chunk; the decay into a new document is exactly zero."""
    x, step, B, _, keep = part
    decay = jnp.where(keep[:, :, None, None] == 0, 0, jnp.exp(step[:, :, None] * A_ND))
    return decay, recur(decay, (step * x)[:, :, None] * B[..., None], state_BND, False, by_association)


def _cotangents(
    decay: Array, h: Array, C: Array, dy: Array, start_BND: Array, behind_BND: Array, by_association: bool
) -> tuple[Array, Array, Array]:
    """(g, cotangent of the log decay) (B, C, N, D) of one chunk, and decay * g of its first token (B, N, D)."""
    if by_association:
        following = jnp.concatenate([decay[:, 1:], jnp.ones_like(decay[:, :1])], axis=1)
        g = recur(following, C[..., None] * dy[:, :, None], behind_BND, True, by_association)
        before = jnp.concatenate([start_BND[:, None], h[:, :-1]], axis=1)
        return g, g * decay * before, decay[:, 0] * g[:, 0]

    def at(v: Array, t: Array) -> Array:
        return jax.lax.dynamic_index_in_dim(v, t, 1, keepdims=False)

    def token(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        behind_BND, all_g, all_dlog = carry
        t = decay.shape[1] - 1 - i
        g = at(C, t)[..., None] * at(dy, t)[:, None] + behind_BND
        kept = at(decay, t) * g
        before = jnp.where(t == 0, start_BND, at(h, jnp.maximum(t - 1, 0)))
        put = jax.lax.dynamic_update_index_in_dim
        return kept, put(all_g, g, t, 1), put(all_dlog, kept * before, t, 1)

    empty = jnp.zeros_like(h)
    kept, g, dlog = jax.lax.fori_loop(0, decay.shape[1], token, (behind_BND, empty, empty))
    return g, dlog, kept


def _dot(dims: str, left: Array, right: Array) -> Array:
    """Sums as exact products: on a CPU they take a tenth of the time of a reduction over an inner dim."""
    return jnp.einsum(dims, left, right, precision=jax.lax.Precision.HIGHEST)


def _put(whole: Array, part: Array, j: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), j * part.shape[1], 1)


def _pad(v: Array, tokens: int) -> Array:
    return jnp.pad(v, [(0, 0), (0, tokens), (0, 0)]) if tokens else v
