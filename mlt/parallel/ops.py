"""The ops as mixers call them: on arrays of the whole mesh, each device working on its own rows, tokens and heads.

Every function takes the layout (`Rules`) first and otherwise what the op of that name in `mlt_kernels` takes. Where the
sequence is split over devices, what must cross is part of the function: states for the recurrences, keys and values for
attention, a few inputs for the convolution. Document boundaries come from `segment_ids`, which is split like the tokens.
"""

from typing import Any

import jax
import mlt_kernels

from mlt.parallel.local import CHANNELS, HEADS, KV_HEADS, Q_HEADS, TOKENS, local
from mlt.parallel.rules import Rules


def linear_recurrence(
    rules: Rules,
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    beta: jax.Array | None = None,
    log_input: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    exchange: str | None = None,
    **options: Any,
) -> jax.Array:
    """`mlt_kernels.linear_recurrence` over the mesh; heads over `tensor`, a state for every `context` shard.

    Args:
        exchange: how states cross sequence shards; None takes the layout's choice.
        options: rule, normalizer, scale, chunk_size, implementation.
    """

    def run(q, k, v, log_decay, beta, log_input, segment_ids):
        return mlt_kernels.linear_recurrence(
            q, k, v, log_decay=log_decay, beta=beta, log_input=log_input, segment_ids=segment_ids, **options
        )

    gate = {1: HEADS, 3: CHANNELS, 4: Q_HEADS}.get(getattr(log_decay, "ndim", 1))
    inputs = (KV_HEADS, KV_HEADS, Q_HEADS, gate, CHANNELS, CHANNELS, TOKENS)
    return local(run, rules, inputs, Q_HEADS)(q_BTHK, k_BTHK, v_BTHV, log_decay, beta, log_input, segment_ids)


def diagonal_recurrence(
    rules: Rules,
    a: jax.Array,
    b: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    exchange: str | None = None,
    **options: Any,
) -> jax.Array:
    """`mlt_kernels.diagonal_recurrence` over the mesh; the dim after (B, T) is split over `tensor`."""
    axes = (*CHANNELS, *(None,) * (a.ndim - 3))

    def run(a, b, segment_ids):
        return mlt_kernels.diagonal_recurrence(a, b, segment_ids=segment_ids, **options)

    return local(run, rules, (axes, axes, TOKENS), axes)(a, b, segment_ids)


def causal_conv(
    rules: Rules,
    x_BTD: jax.Array,
    kernel_WD: jax.Array,
    *,
    bias: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    channels: str = "heads",
    **options: Any,
) -> jax.Array:
    """`mlt_kernels.causal_conv` over the mesh.

    Args:
        channels: logical axis of the channels.
        options: activation, dilation, implementation.
    """
    stream = ("batch", "seq", channels)

    def run(x, kernel, bias, segment_ids):
        return mlt_kernels.causal_conv(x, kernel, bias=bias, segment_ids=segment_ids, **options)

    return local(run, rules, (stream, (None, channels), (channels,), TOKENS), stream)(x_BTD, kernel_WD, bias, segment_ids)


def attention(
    rules: Rules,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKP: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    sinks: jax.Array | None = None,
    exchange: str | None = None,
    **options: Any,
) -> jax.Array:
    """`mlt_kernels.attention` of a row with itself over the mesh.

    Args:
        exchange: how keys and values cross sequence shards; None takes the layout's choice.
        options: causal, window, softcap, scale, implementation.
    """

    def run(q, k, v, segment_ids, sinks):
        return mlt_kernels.attention(q, k, v, segment_ids=segment_ids, sinks=sinks, **options)

    inputs = (Q_HEADS, KV_HEADS, KV_HEADS, TOKENS, HEADS)
    return local(run, rules, inputs, Q_HEADS)(q_BTNH, k_BTKH, v_BTKP, segment_ids, sinks)
