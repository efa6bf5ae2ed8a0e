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
from mlt_kernels.linear_recurrence._scan import scan_chunks
from mlt_kernels.linear_recurrence.reference import EMPTY_LOG_SCALE, LARGEST_BOUND

HIGHEST = jax.lax.Precision.HIGHEST

Carry = tuple[Array, ...]
"""State (Y, K, V) and, normalised, key sum (Y, K) and log scale (Y,)."""


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
    wide = jnp.result_type(jnp.float32, *(x for x in (q, k, v, log_decay, beta) if x is not None))
    # The delta rule writes what a value has more than was read for it. Where keys repeat, such differences cancel from
    # token to token, and one operand of 16 bits among them costs several per cent of the result.
    low = wide if rule == "delta" else jnp.result_type(q, k, v)
    vector = log_decay is not None and log_decay.ndim == 4
    R = H // q.shape[2]
    normalized = normalizer != "none"
    floor = 0.0 if normalizer == "mlstm" else EMPTY_LOG_SCALE

    def whole(x: Array, **padding: Any) -> Array:
        """`x` (B, T, ...) up to the end of the last chunk."""
        return jnp.pad(x, [(0, 0), (0, J * C - T)] + [(0, 0)] * (x.ndim - 2), **padding)

    inputs = {"q": whole(q), "k": whole(k), "v": whole(v)}
    if log_decay is not None:
        inputs["g"] = whole(jnp.broadcast_to(log_decay, (B, T, H, *log_decay.shape[3:])))
    elif normalized:
        inputs["g"] = whole(jnp.zeros((B, T, H), wide))
    if normalized:
        gate = jnp.zeros((B, T, H), wide) if log_input is None else log_input
        inputs["log_input"] = whole(gate, constant_values=EMPTY_LOG_SCALE)
    elif log_input is not None:
        beta = jnp.exp(log_input) if beta is None else beta * jnp.exp(log_input)
    if beta is not None:
        inputs["beta"] = whole(beta)
    masks = {}
    if segment_ids is not None:
        masks["real"] = whole(segment_ids != 0)
        masks["first"] = whole(_first_places(segment_ids, C), mode="edge")

    def dot(a: Array, b: Array) -> Array:
        return jnp.matmul(a.astype(low), b.astype(low), precision=HIGHEST, preferred_element_type=wide)

    def full_dot(a: Array, b: Array) -> Array:
        return jnp.matmul(a.astype(wide), b.astype(wide), precision=HIGHEST)

    def chunk(carry: Carry, inputs: dict[str, Array], masks: dict[str, Array]) -> tuple[Carry, Array]:
        state_YKV = carry[0]
        first_BC, real_BC = masks.get("first"), masks.get("real")

        def heads_first(name: str, padding: float = 0.0) -> Array:
            """(B, C, heads, ...) as (B heads, C, ...), with `padding` at padding tokens."""
            x = inputs[name]
            if real_BC is not None:
                x = jnp.where(real_BC.reshape(B, C, *[1] * (x.ndim - 2)), x, padding)
            return jnp.swapaxes(x, 1, 2).reshape(-1, C, *x.shape[3:])

        q_XCK, k_XCK, v_YCV = (heads_first(name).astype(low) for name in "qkv")
        q_YCK, k_YCK = (_decay.repeat_heads(x, R) for x in (q_XCK, k_XCK))
        g = jnp.maximum(heads_first("g"), _decay.LOWEST) if "g" in inputs else None
        beta_YC = heads_first("beta") if "beta" in inputs else None
        meet = _decay.chunk_masks(C, None if first_BC is None else jnp.repeat(first_BC, H, axis=0))
        if normalized:
            log_input_YC = heads_first("log_input", EMPTY_LOG_SCALE)
            decay, scale_YC = _decay.scaled_decay(g, meet, R, log_input_YC, carry[2], floor)
        elif vector:
            decay = _decay.vector_decay(g, meet)
            q_XCK, k_XCK = q_YCK, k_YCK
        elif g is None:
            decay = _decay.no_decay(meet, R, wide)
        else:
            decay = _decay.scalar_decay(g, meet, R)

        if rule == "delta":
            v_YCV = v_YCV - decay.read(k_YCK, state_YKV, dot)
        write_YCV = v_YCV if beta_YC is None else _decay.scale_rows(v_YCV, beta_YC)
        if rule == "delta":
            scores_YCC, overlap_YCC = decay.scores(q_XCK, k_XCK, dot, keys=True)
            if beta_YC is not None:
                overlap_YCC = _decay.scale_rows(overlap_YCC, beta_YC)
            write_YCV = solve(jnp.tril(overlap_YCC, -1), write_YCV)
        else:
            (scores_YCC,) = decay.scores(q_XCK, k_XCK, dot, keys=False)
        if normalizer == "sum":
            # The same rounded weights of the same values above and below the line: one token alone gives its value, with no
            # gradient for its weight. Weights of one sign lose nothing by it; mLSTM's may cancel and are summed as they are.
            weights_YCC = scores_YCC if beta_YC is None else scores_YCC * beta_YC[:, None, :]
            weights_YCC = rounded(weights_YCC, low)
            inside_YCV = weighted(weights_YCC, v_YCV)
        else:
            inside_YCV = dot(scores_YCC, write_YCV)
        o_YCV = scale * (decay.read(q_YCK, state_YKV, dot) + inside_YCV)
        leaving = (decay.update(state_YKV, k_YCK, write_YCV, dot),)
        if normalized:
            one_YC1 = jnp.ones((B * H, C, 1), wide) if beta_YC is None else beta_YC[..., None]
            weighed = (weights_YCC, jnp.ones_like(one_YC1)) if normalizer == "sum" else (scores_YCC, one_YC1)
            sum_YC1 = decay.read(q_YCK, carry[1][..., None], full_dot) + full_dot(*weighed)
            sum_YC1 = scale * sum_YC1
            if normalizer == "mlstm":
                bound_YC = jnp.exp(-jnp.minimum(scale_YC, LARGEST_BOUND))
                sum_YC1 = jnp.maximum(jnp.abs(sum_YC1), bound_YC[..., None])
            o_YCV = o_YCV / jnp.where(sum_YC1 == 0, 1, sum_YC1)
            key_sum_YK1 = decay.update(carry[1][..., None], k_YCK, one_YC1, full_dot)
            leaving = (*leaving, key_sum_YK1[..., 0], scale_YC[:, -1])
            if real_BC is not None:
                # Nothing was added, so nothing was scaled: the parts of the state keep their gradients too.
                some_Y = jnp.repeat(jnp.any(real_BC, axis=1), H)
                kept = [jnp.where(some_Y.reshape(-1, *[1] * (x.ndim - 1)), x, y) for x, y in zip(leaving, carry, strict=True)]
                leaving = tuple(kept)
        return leaving, jnp.swapaxes(o_YCV.astype(v.dtype).reshape(B, H, C, V), 1, 2)

    carry = _start(initial_state, B, H, K, V, normalizer, wide)
    carry, o_BTHV, entering = scan_chunks(chunk, C, return_chunk_states, carry, inputs, masks)
    result: list[Any] = [o_BTHV[:, :T]]
    if return_final_state:
        final = [x.reshape(B, H, *x.shape[1:]) for x in carry]
        result.append(NormalizedState(*final) if normalized else final[0])
    if return_chunk_states:
        result.append(jnp.moveaxis(entering[0].reshape(J, B, H, K, V), 0, 1))
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


def _start(state: Array | NormalizedState | None, B: int, H: int, K: int, V: int, normalizer: str, dtype: Any) -> Carry:
    """The carry before the first chunk."""
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
