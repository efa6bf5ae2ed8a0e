"""The ops as mixers call them: on arrays of the whole mesh, each device working on its own rows, tokens and heads.

Every function takes the layout (`Rules`) first and otherwise what the op of that name in `mlt_kernels` takes. Where the
sequence is split over devices, what must cross is part of the function: states for the recurrences (`carry.py`), keys and
values for attention (`ring.py`), a few inputs for the convolution. Documents come from `segment_ids`, split like the tokens.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import mlt_kernels

from mlt.parallel import carry, crossings, entering, lookup, ring, sequence
from mlt.parallel.local import CHANNELS, HEADS, KV_HEADS, Q_HEADS, STREAM, TOKENS, Axes, Whole, local
from mlt.parallel.rules import Rules
from mlt.parallel.table import CAPACITY, Strategy, WideRows
from mlt.parallel.taps import TapedTable


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
    **options: Any,
) -> jax.Array:
    """`mlt_kernels.linear_recurrence` over the mesh: heads over `tensor`, the state carried over `context` shards.

    Args:
        options: rule, normalizer, scale, chunk_size, implementation.
    """

    def run(q, k, v, log_decay, beta, log_input, segment_ids):
        gates = {"log_decay": log_decay, "beta": beta, "log_input": log_input, "segment_ids": segment_ids}
        state = None
        if rules.size("seq") > 1:
            state = entering.of_linear_recurrence(rules, q, k, v, **gates, **options)
        return mlt_kernels.linear_recurrence(q, k, v, initial_state=state, **gates, **options)

    gate = {1: HEADS, 3: CHANNELS, 4: Q_HEADS}.get(getattr(log_decay, "ndim", 1))
    inputs = (KV_HEADS, KV_HEADS, Q_HEADS, gate, CHANNELS, CHANNELS, TOKENS)
    return local(run, rules, inputs, Q_HEADS)(q_BTHK, k_BTHK, v_BTHV, log_decay, beta, log_input, segment_ids)


def diagonal_recurrence(
    rules: Rules,
    a: jax.Array,
    b: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    **options: Any,
) -> jax.Array:
    """`mlt_kernels.diagonal_recurrence` over the mesh; the dim after (B, T) is split over `tensor`.

    Args:
        options: implementation.
    """
    axes = (*CHANNELS, *(None,) * (a.ndim - 3))

    def run(a, b, segment_ids):
        state = None
        if rules.size("seq") > 1:
            segments = sequence.segments_of(b, segment_ids)
            final = lambda b, start: mlt_kernels.diagonal_recurrence(  # noqa: E731
                a, b, initial_state=start, segment_ids=segments, return_final_state=True, **options
            )[1]
            one = jnp.ones((a.shape[0], *a.shape[2:]), a.dtype)
            transition = final(jnp.zeros_like(b), one)
            # A document that starts at token 0 does not take what is in front of it; `incoming` sees to that border.
            whole = sequence.one_document(segments).reshape(-1, *[1] * (a.ndim - 2))
            transition = jnp.where(whole, transition, jnp.zeros((), transition.dtype))
            state = entering.carried(rules, segments, transition, final(b, None), carry.DIAGONAL)
        return mlt_kernels.diagonal_recurrence(a, b, initial_state=state, segment_ids=segment_ids, **options)

    return local(run, rules, (axes, axes, TOKENS), axes)(a, b, segment_ids)


def selective_scan(
    rules: Rules,
    x_BTD: jax.Array,
    step_BTD: jax.Array,
    A_DN: jax.Array,
    B_BTN: jax.Array,
    C_BTN: jax.Array,
    *,
    skip: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    **options: Any,
) -> jax.Array:
    """`mlt_kernels.selective_scan` over the mesh: channels over `tensor`, the state carried over `context` shards.

    Args:
        options: implementation.
    """

    def run(x, step, A, B, C, skip, segment_ids):
        scan = functools.partial(mlt_kernels.selective_scan, x, step, A, B, C, **options)
        state = None
        if rules.size("seq") > 1:
            segments = sequence.segments_of(x, segment_ids)
            _, end = scan(segment_ids=segments, return_final_state=True)
            total_BD = jnp.where(segments[..., None] != 0, step.astype(jnp.float32), 0.0).sum(1)
            whole = sequence.one_document(segments)[:, None, None]
            transition = jnp.where(whole, jnp.exp(total_BD[..., None] * A.astype(jnp.float32)), 0.0)
            state = entering.carried(rules, segments, transition, end, carry.DIAGONAL)
        return scan(skip=skip, initial_state=state, segment_ids=segment_ids)

    shared = (*TOKENS, None)
    inputs = (CHANNELS, CHANNELS, ("heads", None), shared, shared, HEADS, TOKENS)
    return local(run, rules, inputs, CHANNELS)(x_BTD, step_BTD, A_DN, B_BTN, C_BTN, skip, segment_ids)


def causal_conv(
    rules: Rules,
    x_BTD: jax.Array,
    kernel_WD: jax.Array,
    *,
    bias: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    channels: str | None = "heads",
    **options: Any,
) -> jax.Array:
    """`mlt_kernels.causal_conv` over the mesh; sequence shards pass on the inputs that the next one's taps reach.

    Args:
        kernel_WD, bias: in the type they are kept in; they are cast to that of x.
        channels: logical axis of the channels.
        options: activation, dilation, implementation.
    """
    stream = ("batch", "seq", channels)

    def run(x, kernel, bias, segment_ids):
        kernel, bias = (None if weights is None else weights.astype(x.dtype) for weights in (kernel, bias))
        halo = None
        if rules.size("seq") > 1:
            width = (kernel.shape[0] - 1) * options.get("dilation", 1)
            halo = sequence.left_context(x, sequence.segments_of(x, segment_ids), width, rules.size("seq"))
        return mlt_kernels.causal_conv(x, kernel, bias=bias, segment_ids=segment_ids, halo=halo, **options)

    inputs = (stream, Whole((None, channels), x_BTD.dtype), Whole((channels,), x_BTD.dtype), TOKENS)
    return local(run, rules, inputs, stream)(x_BTD, kernel_WD, bias, segment_ids)


def attention(
    rules: Rules,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKP: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    sinks: jax.Array | None = None,
    **options: Any,
) -> jax.Array:
    """Causal `mlt_kernels.attention` of a row with itself over the mesh.

    Args:
        options: window, softcap, scale, implementation.
    """
    size = rules.size("seq")

    def run(q, k, v, segment_ids, sinks):
        if size == 1:
            return mlt_kernels.attention(q, k, v, segment_ids=segment_ids, sinks=sinks, **options)
        shape = {"tokens": q.shape[1] * size, "heads": q.shape[2], "kv_heads": k.shape[2], "window": options.get("window")}
        strategy = rules.attention
        if strategy is not None and crossings.refusal(strategy, **shape, size=size):
            raise ValueError(
                f"attention over {size} sequence shards: {strategy!r} {crossings.refusal(strategy, **shape, size=size)}"
            )
        strategy = strategy or crossings.choose(**shape, size=size)
        return ring.attend(q, k, v, sequence.segments_of(q, segment_ids), sinks, strategy, ring.Options(size, **options))

    inputs = (Q_HEADS, KV_HEADS, KV_HEADS, TOKENS, HEADS)
    return local(run, rules, inputs, Q_HEADS)(q_BTNH, k_BTKH, v_BTKP, segment_ids, sinks)


def with_left_context(
    fn: Callable[..., Any], rules: Rules, width: int, arrays: tuple[jax.Array, ...], others: tuple[jax.Array, ...], output: Any
) -> Any:
    """`fn(*arrays, *others)` where `fn` looks at most `width` tokens to the left.

    Args:
        fn: its first arguments are (B, T', ...), and so is its result; T' may be any length, and the first `width` tokens
            of a longer row may come out wrong where it is a shard: they are cut off.
        width: tokens to the left that an output may depend on.
        arrays: (B, T) arrays, or (B, T, ...) that no axis splits further. Zeros stand in front of the row's start, so
            the segment id there is that of padding.
        others: arrays that every device holds whole.
        output: logical axes of the result, or a tree of them.
    """
    size = rules.size("seq")
    if size == 1 or width == 0:
        return fn(*arrays, *others)

    def run(*args):
        tokens = sequence.with_front(args[: len(arrays)], width, size)
        return jax.tree.map(lambda out: out[:, width:], fn(*tokens, *args[len(arrays) :]))

    inputs = tuple((*TOKENS, *(None,) * (x.ndim - 2)) for x in arrays) + tuple((None,) * x.ndim for x in others)
    return local(run, rules, inputs, output)(*arrays, *others)


def embedding(rules: Rules, table_VD: jax.Array, token_ids_BT: jax.Array, dtype: Any) -> jax.Array:
    """Rows of a table split by `vocab`: each shard looks up its own, and the sum over shards has one that is not zero."""
    if rules.mesh is None or rules.mesh.size == 1:
        return jnp.take(table_VD, token_ids_BT, axis=0, mode="clip").astype(dtype)
    shards, total = rules.size("vocab"), table_VD.shape[0]

    def run(table, ids):
        ids = jnp.clip(ids, 0, total - 1)
        if shards == 1:
            return jnp.take(table, ids, axis=0).astype(dtype)
        own = ids - jax.lax.axis_index("tensor") * table.shape[0]
        here = (own >= 0) & (own < table.shape[0])
        rows = jnp.take(table, jnp.clip(own, 0, table.shape[0] - 1), axis=0).astype(dtype)
        return jax.lax.psum(jnp.where(here[..., None], rows, jnp.zeros((), dtype)), "tensor")

    return local(run, rules, (("vocab", None), TOKENS), STREAM)(table_VD, token_ids_BT)


def cross_entropy(
    rules: Rules,
    hidden_BTD: jax.Array,
    unembedding_DV: jax.Array,
    labels_BT: jax.Array,
    *,
    weights: jax.Array,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> jax.Array:
    """`mlt_kernels.cross_entropy` over the mesh, (B, T) losses. Vocabulary shards meet in two numbers per token.

    Args:
        unembedding_DV: in the type it is kept in; it is cast to that of the hidden states.
    """
    options = {"z_loss": z_loss, "softcap": softcap}
    if rules.mesh is None or rules.mesh.size == 1:
        head = unembedding_DV.astype(hidden_BTD.dtype)
        return mlt_kernels.cross_entropy(hidden_BTD, head, labels_BT, weights=weights, **options)

    def run(hidden, unembedding, labels, weights):
        if rules.size("vocab") == 1:
            return mlt_kernels.cross_entropy(hidden, unembedding, labels, weights=weights, **options)
        own = labels - jax.lax.axis_index("tensor") * unembedding.shape[1]
        loss, lse = mlt_kernels.cross_entropy(hidden, unembedding, own, softcap=softcap, return_lse=True)
        label_logit = jax.lax.psum(lse - loss, "tensor")
        lse = jax.nn.logsumexp(jax.lax.all_gather(lse, "tensor"), axis=0)
        return weights * (lse - label_logit + z_loss * jnp.square(lse))

    inputs = (STREAM, Whole(("embed", "vocab"), hidden_BTD.dtype), TOKENS, TOKENS)
    return local(run, rules, inputs, TOKENS)(hidden_BTD, unembedding_DV, labels_BT, weights)


def row_lookup(
    rules: Rules,
    table_MV: jax.Array | TapedTable,
    rows_BTK: jax.Array | WideRows,
    weights_BTK: jax.Array | None = None,
    *,
    strategy: Strategy | None = None,
    capacity: float | None = CAPACITY,
    return_waiting: bool = False,
    **options: Any,
) -> Any:
    """`mlt_kernels.row_lookup` of a table whose rows are split over `memory` shards (`lookup.py`).

    Args:
        rows_BTK: int32, or `WideRows` for a table of more rows than that.
        strategy: how rows cross owners, one of `table.STRATEGIES`; None takes what sends less.
        capacity: rows that an owner takes from each device in one round of an exchange, as a multiple of an even share; what
            is over takes further rounds. None makes room for the worst case.
        return_waiting: also give a mixer's aux, which counts the rows that took further rounds; empty where rows stay.
        options: implementation.
    """
    out, waiting = lookup.row_lookup(rules, table_MV, rows_BTK, weights_BTK, strategy=strategy, capacity=capacity, **options)
    if not return_waiting:
        return out
    return out, {} if waiting is None else {"metric/rows_waiting": waiting.astype(jnp.float32)}


def row_dot(
    rules: Rules, table_MV: jax.Array | TapedTable, rows_BTK: jax.Array | WideRows, x_BTV: jax.Array, **options: Any
) -> jax.Array:
    """`mlt_kernels.row_dot` of a table whose rows are split over `memory` shards, (B, T, K).

    Each owner multiplies its rows with the vectors of all shards, and the products meet in a reduce-scatter: one number for
    each row read, and no row moves.
    """
    return lookup.row_dot(rules, table_MV, rows_BTK, x_BTV, **options)


def top_k(rules: Rules, x: jax.Array, k: int, axes: Axes) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k` along the last dim, which is whole; the partitioner would gather the others.

    Args:
        axes: logical axes of x.
    """
    return local(lambda x: tuple(jax.lax.top_k(x, k)), rules, (axes,), (axes, axes))(x)
