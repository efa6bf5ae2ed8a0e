"""What the decays do inside one chunk: to the scores of its pairs of tokens, to reads and to writes of the state.

Letters: B rows, H value heads, Y = B H, X = B Hk rows and query/key heads, R = H / Hk, C tokens of the chunk (i as
query, j as key), K key dim, V value dim. Every exponent is a sum of log decays, at most 0, over tokens of one
document: nothing overflows, and no bit crosses a document border. Dims of size 1 are avoided: XLA's CPU sums over
arrays that have one are 10 to 20 times slower.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mlt_kernels.linear_recurrence import _vector

HIGHEST = jax.lax.Precision.HIGHEST
LOWEST = -128.0
"""Log decays are clamped here; from -104 on, exp is 0 in float32."""
GRID = 2.0**8
KEY_GRID = 2.0**11
"""Keys of norm at most 1 on this grid have products and sums of products that float32 holds exactly."""

Product = Callable[[Array, Array], Array]
"""Batched matrix product of operands cast to the op's operand dtype, accumulated in the wide dtype."""


class Masks(NamedTuple):
    """Which tokens of a chunk meet, for every row and head."""

    lower_YCC: Array  # key not after query, same document; (1, C, C) where no documents are told apart
    carried_YC: Array | None  # token of the document the chunk was entered with; None is all


def chunk_masks(length: int, first_YC: Array | None) -> Masks:
    """Masks from the place in the chunk of the first token of each token's document, negative if before the chunk.

    Comparing places, not document numbers, lets XLA fuse the mask into what it masks.
    """
    place = jnp.arange(length)
    lower_CC = place[:, None] >= place
    if first_YC is None:
        return Masks(lower_CC[None], None)
    return Masks(lower_CC & (first_YC[:, :, None] <= place), first_YC < 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def repeat_heads(x_X: Array, times: int) -> Array:
    """(X, ...) to (Y, ...): each query/key head for every value head that reads it."""
    if times == 1:
        return x_X
    repeated = jnp.broadcast_to(x_X[:, None], (x_X.shape[0], times, *x_X.shape[1:]))
    return repeated.reshape(-1, *x_X.shape[1:])


def _repeat_heads_fwd(x_X: Array, times: int) -> tuple[Array, None]:
    return repeat_heads(x_X, times), None


def _repeat_heads_bwd(times: int, _: None, grad_Y: Array) -> tuple[Array]:
    if times == 1:
        return (grad_Y,)
    X, rest = grad_Y.shape[0] // times, grad_Y.shape[1:]
    if X == 1:
        return (jnp.sum(grad_Y.reshape(times, -1), axis=0).reshape(1, *rest),)
    return (jnp.sum(grad_Y.reshape(X, times, -1), axis=1).reshape(X, *rest),)


repeat_heads.defvjp(_repeat_heads_fwd, _repeat_heads_bwd)


@jax.custom_vjp
def scale_rows(x: Array, factor: Array) -> Array:
    """x (..., D) times factor (...)."""
    return x * factor[..., None]


def _scale_rows_fwd(x: Array, factor: Array) -> tuple[Array, tuple[Array, Array]]:
    return x * factor[..., None], (x, factor)


def _scale_rows_bwd(residuals: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, factor = residuals
    # A product with ones, not a sum: XLA may hand the sum a dim of size 1.
    ones = jnp.ones((x.shape[-1], 1), grad.dtype)
    return (grad * factor[..., None]).astype(x.dtype), jnp.matmul(grad * x, ones, precision=HIGHEST)[..., 0]


scale_rows.defvjp(_scale_rows_fwd, _scale_rows_bwd)


@jax.custom_vjp
def overlaps(k_XCK: Array) -> Array:
    """(X, C, C): k_i . k_j to the last digit.

    A plain sum over K is several units off, and by the same amount for every pair of tokens with one key: at full
    reflection each token adds that to the state. Here the keys' leading digits meet exactly and the rest is small.
    """
    lead_XCK = jnp.round(k_XCK * KEY_GRID) / KEY_GRID
    rest_XCK = k_XCK - lead_XCK
    exact_XCC = _matmul(lead_XCK, jnp.swapaxes(lead_XCK, 1, 2))
    half_XCC = _matmul(lead_XCK + rest_XCK / 2, jnp.swapaxes(rest_XCK, 1, 2))
    return exact_XCC + (half_XCC + jnp.swapaxes(half_XCC, 1, 2))


def _overlaps_bwd(k_XCK: Array, grad_XCC: Array) -> tuple[Array]:
    return (_matmul(grad_XCC + jnp.swapaxes(grad_XCC, 1, 2), k_XCK),)


overlaps.defvjp(lambda k_XCK: (overlaps(k_XCK), k_XCK), _overlaps_bwd)


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=HIGHEST)


class ScalarDecay(NamedTuple):
    """One decay a head, or none: factors on the scores and, None being 1, on reads of the entering state.

    The last token's factors are those of the state that leaves the chunk.
    """

    pair_YCC: Array
    into_YC: Array | None
    repeats: int  # R

    def scores(self, q_XCK: Array, k_XCK: Array, dot: Product, *, keys: bool) -> list[Array]:
        """(Y, C, C): q_i . k_j and, with `keys`, k_i . k_j, decayed from j to i, 0 where they do not meet."""
        products_XCC = [dot(q_XCK, jnp.swapaxes(k_XCK, 1, 2)), *([overlaps(k_XCK)] if keys else [])]
        return [repeat_heads(x_XCC, self.repeats) * self.pair_YCC for x_XCC in products_XCC]

    def read(self, x_YCK: Array, state_YKV: Array, dot: Product) -> Array:
        """(Y, C, V): what each x reads of the state that entered the chunk."""
        read_YCV = dot(x_YCK, state_YKV)
        return read_YCV if self.into_YC is None else scale_rows(read_YCV, self.into_YC)

    def update(self, state_YKV: Array, k_YCK: Array, write_YCV: Array, dot: Product) -> Array:
        """The state after the chunk."""
        if self.into_YC is not None:
            write_YCV = scale_rows(write_YCV, self.pair_YCC[:, -1])
            state_YKV = state_YKV * self.into_YC[:, -1, None, None]
        return state_YKV + dot(jnp.swapaxes(k_YCK, 1, 2), write_YCV)


def no_decay(masks: Masks, repeats: int, dtype: Any) -> ScalarDecay:
    """Factors of 1 where tokens meet."""
    into_YC = None if masks.carried_YC is None else masks.carried_YC.astype(dtype)
    return ScalarDecay(masks.lower_YCC.astype(dtype), into_YC, repeats)


def scalar_decay(g_YC: Array, masks: Masks, repeats: int) -> ScalarDecay:
    """Factors exp(G_i - G_j) and exp(G_i), with G the sum of log decays since the document or chunk began."""
    pair_YCC, into_YC = _log_decay(g_YC, masks)
    return ScalarDecay(jnp.exp(pair_YCC), jnp.exp(into_YC), repeats)


def scaled_decay(
    g_YC: Array, masks: Masks, repeats: int, log_input_YC: Array, log_scale_Y: Array, floor: float
) -> tuple[ScalarDecay, Array]:
    """As `scalar_decay`, with writes times exp(log_input) and each token's sums divided by exp of its log scale.

    The log scale, (Y, C), is the largest log weight so far. No result depends on it, so it is a constant to the
    gradient, which would otherwise carry its noise.
    """
    pair_YCC, into_YC = _log_decay(g_YC, masks)
    pair_YCC = pair_YCC + log_input_YC[:, None, :]
    into_YC = into_YC + log_scale_Y[:, None]
    largest_YC = jnp.maximum(jnp.maximum(jnp.max(pair_YCC, axis=2), into_YC), floor)
    scale_YC = jax.lax.stop_gradient(largest_YC)
    decay = ScalarDecay(jnp.exp(pair_YCC - scale_YC[..., None]), jnp.exp(into_YC - scale_YC), repeats)
    return decay, scale_YC


@jax.custom_vjp
def _log_decay(g_YC: Array, masks: Masks) -> tuple[Array, Array]:
    """G_i - G_j and G_i, -inf where tokens do not meet.

    G is kept as a multiple of 1/256, whose sums and differences are exact, and a small rest: in one float32 sum a
    few strong decays would leave no digits for the mild ones that follow. The gradient sums, for each token, over
    the pairs it lies between; by way of G it would be a small difference of large sums.
    """
    coarse_YC = jnp.round(g_YC * GRID) / GRID
    within_YCC = masks.lower_YCC.astype(g_YC.dtype)
    parts_Y2C = jnp.stack([coarse_YC, g_YC - coarse_YC], axis=1)
    if within_YCC.shape[0] == 1:
        sums_Y2C = jnp.matmul(parts_Y2C, within_YCC[0].T, precision=HIGHEST)
    else:
        sums_Y2C = jnp.matmul(parts_Y2C, jnp.swapaxes(within_YCC, 1, 2), precision=HIGHEST)
    coarse_YC, fine_YC = sums_Y2C[:, 0], sums_Y2C[:, 1]
    pair_YCC = (coarse_YC[:, :, None] - coarse_YC[:, None, :]) + (fine_YC[:, :, None] - fine_YC[:, None, :])
    into_YC = coarse_YC + fine_YC
    if masks.carried_YC is not None:
        into_YC = jnp.where(masks.carried_YC, into_YC, -jnp.inf)
    return jnp.where(masks.lower_YCC, pair_YCC, -jnp.inf), into_YC


def _log_decay_fwd(g_YC: Array, masks: Masks) -> tuple[tuple[Array, Array], Masks]:
    return _log_decay(g_YC, masks), masks


def _log_decay_bwd(masks: Masks, grads: tuple[Array, Array]) -> tuple[Array, None]:
    grad_pair_YCC, grad_into_YC = grads
    grad_pair_YCC = jnp.where(masks.lower_YCC, grad_pair_YCC, 0)
    if masks.carried_YC is not None:
        grad_into_YC = jnp.where(masks.carried_YC, grad_into_YC, 0)
    place = jnp.arange(grad_into_YC.shape[1])
    earlier_CC = (place[:, None] < place).astype(grad_into_YC.dtype)
    from_earlier_YCC = jnp.matmul(grad_pair_YCC, earlier_CC, precision=HIGHEST) + grad_into_YC[:, :, None]
    return jnp.sum(jnp.where(place[:, None] >= place, from_earlier_YCC, 0), axis=1), None


_log_decay.defvjp(_log_decay_fwd, _log_decay_bwd)


class VectorDecay(NamedTuple):
    """One decay a head and key dim; X is Y."""

    lower_YCC: Array
    factors: _vector.Factors
    into_YCK: Array
    out_YCK: Array

    def scores(self, q_YCK: Array, k_YCK: Array, dot: Product, *, keys: bool) -> list[Array]:
        """(Y, C, C): q_i . k_j and, with `keys`, k_i . k_j, decayed from j to i, 0 where they do not meet."""
        stacked_YCSK = jnp.stack([q_YCK, k_YCK] if keys else [q_YCK], axis=2)
        scores_YCSC = _vector.scores(stacked_YCSK, k_YCK, self.factors, stacked_YCSK.dtype)
        return [jnp.where(self.lower_YCC, scores_YCSC[:, :, s], 0) for s in range(scores_YCSC.shape[2])]

    def read(self, x_YCK: Array, state_YKV: Array, dot: Product) -> Array:
        """(Y, C, V): what each x reads of the state that entered the chunk."""
        return dot(x_YCK * self.into_YCK, state_YKV)

    def update(self, state_YKV: Array, k_YCK: Array, write_YCV: Array, dot: Product) -> Array:
        """The state after the chunk."""
        decayed_YKV = state_YKV * self.into_YCK[:, -1, :, None]
        return decayed_YKV + dot(jnp.swapaxes(k_YCK * self.out_YCK, 1, 2), write_YCV)


def vector_decay(g_YCK: Array, masks: Masks) -> VectorDecay:
    """Factors from log decays of every key dim."""
    factors, into_YCK, out_YCK = _vector.factors(g_YCK)
    if masks.carried_YC is not None:
        into_YCK = jnp.where(masks.carried_YC[..., None], into_YCK, 0)
        out_YCK = jnp.where(masks.lower_YCC[:, -1, :, None], out_YCK, 0)
    return VectorDecay(masks.lower_YCC, factors, into_YCK, out_YCK)
