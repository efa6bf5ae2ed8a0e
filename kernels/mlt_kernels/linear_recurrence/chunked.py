"""Chunk by chunk: matrix products inside a chunk, one state carried between chunks, the body rematerialised.

Letters: B rows, J chunks, C tokens of a chunk, H value heads, Y = B H, X = B Hk rows and query/key heads, R = H / Hk,
K key dim, V value dim.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mlt_kernels import segments
from mlt_kernels.linear_recurrence import NormalizedState, _decay
from mlt_kernels.linear_recurrence._blocks import solve
from mlt_kernels.linear_recurrence.reference import EMPTY_LOG_SCALE, LARGEST_BOUND

HIGHEST = jax.lax.Precision.HIGHEST


def unsupported(**_: Any) -> str | None:
    return None


def run(
    *,
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | None,
    beta: Array | None,
    rule: str,
    log_input: Array | None,
    normalizer: str,
    scale: float,
    initial_state: Array | NormalizedState | None,
    segment_ids: Array | None,
    chunk_size: int,
    return_final_state: bool,
    return_chunk_states: bool,
) -> Any:
    B, T, H, V = v.shape
    K = q.shape[-1]
    C = min(chunk_size, 1 << (T - 1).bit_length())
    J = -(-T // C)
    low = jnp.result_type(q, k, v)
    wide = jnp.result_type(jnp.float32, *(x for x in (q, k, v, log_decay, beta) if x is not None))
    vector = log_decay is not None and log_decay.ndim == 4
    if vector:
        q, k = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (q, k))
    R = H // q.shape[2]
    normalized = normalizer != "none"
    floor = 0.0 if normalizer == "mlstm" else EMPTY_LOG_SCALE

    def real(x: Array, padding: float = 0.0) -> Array:
        """`x` (B, T, ...) with `padding` at padding tokens."""
        if segment_ids is None:
            return x
        return jnp.where((segment_ids != 0).reshape(B, T, *[1] * (x.ndim - 2)), x, padding)

    def chunks(x: Array, **padding: Any) -> Array:
        """(B, T, heads, ...) to (J, B heads, C, ...)."""
        x = jnp.pad(x, [(0, 0), (0, J * C - T)] + [(0, 0)] * (x.ndim - 2), **padding)
        x = jnp.moveaxis(x.reshape(B, J, C, *x.shape[2:]), (1, 3), (0, 2))
        return x.reshape(J, -1, C, *x.shape[4:])

    xs = {"q": chunks(real(q)), "k": chunks(real(k)), "v": chunks(real(v))}
    if log_decay is not None:
        g = jnp.broadcast_to(log_decay, (B, T, H, *log_decay.shape[3:]))
        xs["g"] = chunks(real(jnp.maximum(g, _decay.LOWEST)))
    elif normalized:
        xs["g"] = chunks(jnp.zeros((B, T, H), wide))
    if normalized:
        gate = jnp.zeros((B, T, H), wide) if log_input is None else log_input
        xs["log_input"] = chunks(real(gate, EMPTY_LOG_SCALE), constant_values=EMPTY_LOG_SCALE)
        if segment_ids is not None:
            xs["real"] = chunks(jnp.broadcast_to((segment_ids != 0)[..., None], (B, T, H)))
    elif log_input is not None:
        beta = jnp.exp(log_input) if beta is None else beta * jnp.exp(log_input)
    if beta is not None:
        xs["beta"] = chunks(real(beta))
    if segment_ids is not None:
        first_BTH = jnp.broadcast_to(_first_places(segment_ids, C)[..., None], (B, T, H))
        xs["first"] = chunks(first_BTH, mode="edge")

    def dot(a: Array, b: Array) -> Array:
        return jnp.matmul(a.astype(low), b.astype(low), precision=HIGHEST, preferred_element_type=wide)

    def full_dot(a: Array, b: Array) -> Array:
        return jnp.matmul(a.astype(wide), b.astype(wide), precision=HIGHEST)

    def chunk(carry: tuple[Array, ...], xs: dict[str, Array]) -> tuple[tuple[Array, ...], tuple[Array, Any]]:
        state_YKV = carry[0]
        q_XCK, k_XCK, v_YCV = xs["q"], xs["k"], xs["v"]
        q_YCK, k_YCK = (_decay.repeat_heads(x, R) for x in (q_XCK, k_XCK))
        masks = _decay.chunk_masks(C, xs.get("first"))
        if normalized:
            decay, scale_YC = _decay.scaled_decay(xs["g"], masks, R, xs["log_input"], carry[2], floor)
        elif vector:
            decay = _decay.vector_decay(xs["g"], masks)
        elif log_decay is None:
            decay = _decay.no_decay(masks, R, wide)
        else:
            decay = _decay.scalar_decay(xs["g"], masks, R)

        if rule == "delta":
            v_YCV = v_YCV - decay.read(k_YCK, state_YKV, dot)
        write_YCV = _decay.scale_rows(v_YCV, xs["beta"]) if beta is not None else v_YCV
        if rule == "delta":
            scores_YCC, overlap_YCC = decay.scores([q_XCK, k_XCK], k_XCK, dot)
            if beta is not None:
                overlap_YCC = _decay.scale_rows(overlap_YCC, xs["beta"])
            write_YCV = solve(jnp.tril(overlap_YCC, -1), write_YCV)
        else:
            (scores_YCC,) = decay.scores([q_XCK], k_XCK, dot)
        if normalizer == "sum":
            # The same rounded weights of the same values above and below the line: one token alone gives its value, with no
            # gradient for its weight. Weights of one sign lose nothing by it; mLSTM's may cancel and are summed as they are.
            weights_YCC = scores_YCC if beta is None else scores_YCC * xs["beta"][:, None, :]
            weights_YCC = rounded(weights_YCC, low)
            inside_YCV = weighted(weights_YCC, v_YCV.astype(low))
        else:
            inside_YCV = dot(scores_YCC, write_YCV)
        o_YCV = scale * (decay.read(q_YCK, state_YKV, dot) + inside_YCV)
        leaving = (decay.update(state_YKV, k_YCK, write_YCV, dot),)
        if normalized:
            one_YC1 = xs["beta"][..., None] if beta is not None else jnp.ones((B * H, C, 1), wide)
            weighed = (weights_YCC, jnp.ones_like(one_YC1)) if normalizer == "sum" else (scores_YCC, one_YC1)
            sum_YC1 = decay.read(q_YCK, carry[1][..., None], full_dot) + full_dot(*weighed)
            sum_YC1 = scale * sum_YC1
            if normalizer == "mlstm":
                bound_YC = jnp.exp(-jnp.minimum(scale_YC, LARGEST_BOUND))
                sum_YC1 = jnp.maximum(jnp.abs(sum_YC1), bound_YC[..., None])
            o_YCV = o_YCV / jnp.where(sum_YC1 == 0, 1, sum_YC1)
            key_sum_YK1 = decay.update(carry[1][..., None], k_YCK, one_YC1, full_dot)
            leaving = (*leaving, key_sum_YK1[..., 0], scale_YC[:, -1])
            if "real" in xs:
                # Nothing was added, so nothing was scaled: the parts of the state keep their gradients too.
                some_Y = jnp.any(xs["real"], axis=1)
                kept = [jnp.where(some_Y.reshape(-1, *[1] * (x.ndim - 1)), x, y) for x, y in zip(leaving, carry, strict=True)]
                leaving = tuple(kept)
        return leaving, (o_YCV.astype(v.dtype), state_YKV if return_chunk_states else None)

    carry = _start(initial_state, B, H, K, V, normalizer, wide)
    carry, (o_JYCV, entering) = jax.lax.scan(jax.checkpoint(chunk, prevent_cse=False), carry, xs)
    o_BTHV = jnp.moveaxis(o_JYCV.reshape(J, B, H, C, V), (0, 3), (1, 2)).reshape(B, J * C, H, V)[:, :T]
    result: list[Any] = [o_BTHV]
    if return_final_state:
        final = [x.reshape(B, H, *x.shape[1:]) for x in carry]
        result.append(NormalizedState(*final) if normalized else final[0])
    if return_chunk_states:
        result.append(jnp.moveaxis(entering.reshape(J, B, H, K, V), 0, 1))
    return result[0] if len(result) == 1 else tuple(result)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def rounded(x: Array, dtype: Any) -> Array:
    """`x` with the digits of `dtype`, its gradient as it is."""
    kind = jnp.finfo(dtype)
    return x if kind.bits >= jnp.finfo(x.dtype).bits else jax.lax.reduce_precision(x, kind.nexp, kind.nmant)


rounded.defvjp(lambda x, dtype: (rounded(x, dtype), None), lambda dtype, _, grad: (grad,))


@jax.custom_vjp
def weighted(weights_YCC: Array, v_YCV: Array) -> Array:
    """weights @ v with operands in the dtype of v, in which the weights lose nothing, and weights' gradients in their own.

    Rounded gradients of weights would not meet those of the weights' sum, which take the same away.
    """
    weights = weights_YCC.astype(v_YCV.dtype)
    return jnp.matmul(weights, v_YCV, precision=HIGHEST, preferred_element_type=weights_YCC.dtype)


def _weighted_bwd(saved: tuple[Array, Array], grad_YCV: Array) -> tuple[Array, Array]:
    weights_YCC, v_YCV = saved
    grad_weights_YCC = jnp.matmul(grad_YCV, jnp.swapaxes(v_YCV, 1, 2).astype(grad_YCV.dtype), precision=HIGHEST)
    grad_v_YCV = jnp.matmul(jnp.swapaxes(weights_YCC, 1, 2), grad_YCV, precision=HIGHEST)
    return grad_weights_YCC, grad_v_YCV.astype(v_YCV.dtype)


weighted.defvjp(lambda weights, v: (weighted(weights, v), (weights, v)), _weighted_bwd)


def _start(
    state: Array | NormalizedState | None, B: int, H: int, K: int, V: int, normalizer: str, dtype: Any
) -> tuple[Array, ...]:
    """The carry before the first chunk: state (Y, K, V) and, normalised, key sum (Y, K) and log scale (Y,)."""
    if state is not None:
        parts = tuple(state) if isinstance(state, NormalizedState) else (state,)
        return tuple(x.astype(dtype).reshape(B * H, *x.shape[2:]) for x in parts)
    value = jnp.zeros((B * H, K, V), dtype)
    if normalizer == "none":
        return (value,)
    empty = EMPTY_LOG_SCALE if normalizer == "sum" else 0.0
    return value, jnp.zeros((B * H, K), dtype), jnp.full((B * H,), empty, dtype)


def _first_places(segment_ids_BT: Array, length: int) -> Array:
    """(B, T): place in its chunk of the first token of each token's document, -1 if the chunk was entered with it."""
    B, T = segment_ids_BT.shape
    start_BT = jnp.pad(segments.starts(segment_ids_BT), [(0, 0), (0, -T % length)])
    place = jnp.arange(length)
    start_BJC = start_BT.reshape(B, -1, length)
    earlier = jnp.where(start_BJC[:, :, None] & (place <= place[:, None]), place, -1)
    return jnp.max(earlier, axis=3).reshape(B, -1)[:, :T]
