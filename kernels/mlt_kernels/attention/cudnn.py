"""cuDNN's fused attention, by `jax.nn.dot_product_attention(implementation="cudnn")`: what that serves exactly.

The causal order, a window and grouped heads are cuDNN's own. JAX's public function knows no offsets of documents, so packed
documents go in as a mask, which JAX hands on as a bias of -2**41 for hidden pairs: their probabilities are exact zeros. But
the mask is T times S numbers, its gradient as many again, and no block is skipped; hence MOST_PAIRS. The log-sum-exp comes
rounded to the inputs' type and without a gradient, and is refused.

The backward pass adds dq in an order that changes from run to run unless XLA is told `--xla_gpu_deterministic_ops=true`;
what a hidden pair adds is zero in any order.

Status: masks, windows and gradients checked through JAX's portable form of the same function, programs lowered for cuda; not
run on a GPU.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mlt_kernels import dispatch
from mlt_kernels.attention import Pair
from mlt_kernels.refusals import first_line, refusal

IMPLEMENTATION = "cudnn"
MOST_PAIRS = 2**26
"""Numbers that a mask or bias may have: 128 MiB, and its gradient as much."""
LOWEST = -(2.0**41)
"""What stands for -inf in a bias: cuDNN makes NaN of a row of -inf."""


def unsupported(
    *,
    q: Array,
    k: Array,
    v: Array,
    causal: bool,
    window: int | None,
    segment_ids: tuple[Array, Array] | None,
    positions: Pair | None,
    sinks: Array | None,
    softcap: float | None,
    scale: float,
    bias: Array | None,
    return_lse: bool,
) -> str | None:
    if dispatch.platform() != "gpu":
        return f"cuDNN is for gpu; planned for {dispatch.platform()}"
    if return_lse:
        return "its log-sum-exp has no gradient and is rounded to the type of q"
    for name, given in (("sinks", sinks), ("softcap", softcap)):
        if given is not None:
            return f"cuDNN through JAX has no {name}"
    (B, T, _, H), (S, P) = q.shape, (v.shape[1], v.shape[3])
    if causal and positions is not None:
        return "explicit positions; its causal order is that of the rows"
    if causal and T != S:
        return f"T={T} causal queries of S={S} keys; it counts both from 0, so that the last query would not see the last key"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"inputs of {q.dtype.name}; cuDNN takes bfloat16 and float16"
    if H != P:
        return f"keys of {H} numbers and values of {P}; JAX's function takes one size"
    if segment_ids is None and bias is None:
        return _refused_by_jax(q, k, v, causal, window, segment_ids, scale, bias)
    if q.dtype != jnp.bfloat16:
        return "segment_ids or a bias in float16, whose range is too narrow to hide a pair whatever its score"
    if bias is not None and bias.dtype != q.dtype:
        return f"a bias of {bias.dtype.name}; cuDNN takes one of the type of q, {q.dtype.name}"
    shapes = [] if segment_ids is None else [(B, 1, T, S)]
    shapes += [] if bias is None else [(*bias.shape[:2], T, S)]
    b, n, _, _ = jnp.broadcast_shapes(*shapes)
    if b * n * T * S > MOST_PAIRS:
        return (
            f"segment_ids or a bias are a whole ({b}, {n}, {T}, {S}) mask for cuDNN: more than {MOST_PAIRS} numbers "
            "('tokamax' and 'chunked' need none for segment_ids)"
        )
    return _refused_by_jax(q, k, v, causal, window, segment_ids, scale, bias)


def run(
    *,
    q: Array,
    k: Array,
    v: Array,
    causal: bool,
    window: int | None,
    segment_ids: tuple[Array, Array] | None,
    positions: Pair | None,
    sinks: Array | None,
    softcap: float | None,
    scale: float,
    bias: Array | None,
    return_lse: bool,
) -> Array:
    del positions, sinks, softcap, return_lse
    return _attention(q, k, v, bias, segment_ids, causal, window, scale)


def _attention(
    q: Array, k: Array, v: Array, bias: Any, segment_ids: Any, causal: bool, window: int | None, scale: float
) -> Array:
    T, S = q.shape[1], k.shape[1]
    mask_B1TS = visible = None
    if segment_ids is not None:
        q_seg, k_seg = segment_ids
        mask_B1TS = visible = ((q_seg[:, :, None] == k_seg[:, None, :]) & (k_seg != 0)[:, None, :])[:, None]
    if bias is not None:
        visible = bias > -jnp.inf if visible is None else visible & (bias > -jnp.inf)
        bias = jnp.broadcast_to(jnp.maximum(bias, jnp.asarray(LOWEST, bias.dtype)), (*bias.shape[:2], T, S))
    o_BTNH = jax.nn.dot_product_attention(
        *(q, k, v, bias, mask_B1TS),
        scale=scale,
        is_causal=causal,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=IMPLEMENTATION,
    )
    if visible is None:
        return o_BTNH
    if causal:
        distance_TS = jnp.arange(T)[:, None] - jnp.arange(S)[None]
        band_TS = (distance_TS >= 0) & (distance_TS < (T if window is None else window))
        visible = visible & band_TS
    # A query that sees nothing has spread itself over hidden keys: its output is dropped, and with it every gradient.
    sees_BTN1 = visible.any(axis=-1).swapaxes(1, 2)[..., None]
    return jnp.where(sees_BTN1, o_BTNH, jnp.zeros((), o_BTNH.dtype))


def _refused_by_jax(
    q: Array, k: Array, v: Array, causal: bool, window: int | None, segment_ids: Any, scale: float, bias: Any
) -> str | None:
    """What JAX itself says of the call and its gradient: cuDNN's version, head dims, the GPU's age."""

    def fn(q: Array, k: Array, v: Array, bias: Any, segments: Any) -> Array:
        return _attention(q, k, v, bias, segments, causal, window, scale)

    error = refusal(fn, (q, k, v, bias), segment_ids, errors=(RuntimeError, ValueError, NotImplementedError))
    return None if error is None else f"JAX refuses it: {first_line(error)}"
