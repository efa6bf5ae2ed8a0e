"""Chunk by chunk: matrix products inside a chunk, one state carried between chunks, the body rematerialised.

Letters: B rows, J chunks, C tokens of a chunk, G query/key heads, R value heads of each, H = G R, K key dim,
V value dim.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mlt_kernels import segments
from mlt_kernels.linear_recurrence import _decay
from mlt_kernels.linear_recurrence._blocks import solve

HIGHEST = jax.lax.Precision.HIGHEST


def unsupported(*, normalizer: str, **_: Any) -> str | None:
    if normalizer != "none":
        return f"normalizer={normalizer!r} is not written"
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
    initial_state: Array | None,
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
    if vector and q.shape[2] != H:
        q, k = (jnp.repeat(x, H // q.shape[2], axis=2) for x in (q, k))
    G = q.shape[2]
    R = H // G

    def chunks(x: Array, *heads: int) -> Array:
        """(B, T, heads, ...) to (J, B, *heads, C, ...); padding becomes 0."""
        if segment_ids is not None:
            x = jnp.where((segment_ids != 0).reshape(B, T, *[1] * (x.ndim - 2)), x, 0)
        x = jnp.pad(x, [(0, 0), (0, J * C - T)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(B, J, C, *heads, *x.shape[3:])
        x = jnp.moveaxis(x, 2, 2 + len(heads))
        return jnp.moveaxis(x, 1, 0)

    xs = {"q": chunks(q, G), "k": chunks(k, G), "v": chunks(v, G, R)}
    if log_decay is not None:
        g = jnp.maximum(jnp.broadcast_to(log_decay, (B, T, H, *log_decay.shape[3:])), _decay.LOWEST)
        xs["g"] = chunks(g, H) if vector else chunks(g, G, R)
    if log_input is not None:
        beta = jnp.exp(log_input) if beta is None else beta * jnp.exp(log_input)
    if beta is not None:
        xs["beta"] = chunks(beta, G, R)[..., None]
    if segment_ids is not None:
        document_BT = jnp.pad(segments.documents(segment_ids), [(0, 0), (0, J * C - T)], mode="edge")
        xs["document"] = jnp.moveaxis(document_BT.reshape(B, J, C), 1, 0)
        before_B = jnp.zeros((1, B), jnp.int32)
        xs["entered"] = jnp.concatenate([before_B, xs["document"][:-1, :, -1]])

    def dot(spec: str, a: Array, b: Array) -> Array:
        return jnp.einsum(spec, a.astype(low), b.astype(low), precision=HIGHEST, preferred_element_type=wide)

    def chunk(state_BGRKV: Array, xs: dict[str, Array]) -> tuple[Array, tuple[Array, Array | None]]:
        q_BGCK, k_BGCK, v_BGRCV = xs["q"], xs["k"], xs["v"]
        masks = _decay.chunk_masks(C, xs.get("document"), xs.get("entered"))
        if log_decay is None:
            decay = _decay.no_decay(masks, wide)
        else:
            decay = (_decay.vector_decay if vector else _decay.scalar_decay)(xs["g"], masks)
        if rule == "delta":
            v_BGRCV = v_BGRCV - decay.read(k_BGCK, state_BGRKV, dot)
        write_BGRCV = v_BGRCV * xs["beta"] if beta is not None else v_BGRCV
        if rule == "delta":
            scores_BGRCC, overlap_BGRCC = decay.scores([q_BGCK, k_BGCK], k_BGCK, dot)
            if beta is not None:
                overlap_BGRCC = overlap_BGRCC * xs["beta"]
            write_BGRCV = solve(jnp.tril(overlap_BGRCC, -1), write_BGRCV)
        else:
            (scores_BGRCC,) = decay.scores([q_BGCK], k_BGCK, dot)
        o_BGRCV = decay.read(q_BGCK, state_BGRKV, dot) + dot("bgrij,bgrjv->bgriv", scores_BGRCC, write_BGRCV)
        entering = state_BGRKV if return_chunk_states else None
        return decay.update(state_BGRKV, k_BGCK, write_BGRCV, dot), ((o_BGRCV * scale).astype(v.dtype), entering)

    state = jnp.zeros((B, H, K, V), wide) if initial_state is None else initial_state.astype(wide)
    step = jax.checkpoint(chunk, prevent_cse=False)
    state, (o, entering) = jax.lax.scan(step, state.reshape(B, G, R, K, V), xs)
    o_BTHV = jnp.transpose(o, (1, 0, 4, 2, 3, 5)).reshape(B, J * C, H, V)[:, :T]
    result = [o_BTHV]
    if return_final_state:
        result.append(state.reshape(B, H, K, V))
    if return_chunk_states:
        result.append(jnp.moveaxis(entering, 0, 1).reshape(B, J, H, K, V))
    return result[0] if len(result) == 1 else tuple(result)
