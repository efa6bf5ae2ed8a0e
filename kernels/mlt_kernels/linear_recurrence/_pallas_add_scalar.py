"""The add rule with no decay or one decay a head, in Triton kernels.

Forward: one kernel. A program owns all of K and a slab of V of one state and walks over the chunks with it in registers;
only o leaves (and the states that the caller asks for).
Backward: three kernels, each of which recomputes its own state. `queries` walks forwards with slabs of K and gives dq and
what the gates feel of reads; `keys` walks backwards with slabs of K, `values` with slabs of V. The forward saves no state.
Only where decays have gradients does `queries` leave one chunk's entering state in 16 to `keys` (as float32), which
compares it with its cotangent: what a decay feels between two such anchors is then a difference of few and near terms.

Letters: B rows, T tokens, J chunks, C tokens of a chunk (i as query, j as key), H value heads, X slabs, K key dim, V value
dim. In a kernel: u = write strength.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from mlt_kernels.linear_recurrence import _kernel_inputs as given
from mlt_kernels.linear_recurrence import _pallas_tools as tools
from mlt_kernels.linear_recurrence import _pallas_walk as walks
from mlt_kernels.linear_recurrence._kernel_inputs import Arrays
from mlt_kernels.linear_recurrence._pallas_tools import Layout, Refs, Settings, dot, rows, update


class Factors(NamedTuple):
    """Decays of one chunk and head; None is 1."""

    pair: Array  # (C, C): from j to i, 0 where they do not meet
    into: Array | None  # (C,) from the chunk's start to i, 0 in documents that start later
    out: Array | None  # (C,) from j to the chunk's end, 0 in documents that end earlier
    kept: Array | None  # of the state that entered, 0 if its document ended


def factors(refs: Refs, c: Array, C: int, *, transposed: bool = False) -> Factors:
    """Decays of chunk c; `transposed` gives pairs as (j, i)."""
    tokens = pl.ds(c * C, C)
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (C, C), n) for n in (0, 1))
    i, j = (column, row) if transposed else (row, column)

    def of_queries(x: Array) -> Array:
        return x[None, :] if transposed else x[:, None]

    def of_keys(x: Array) -> Array:
        return x[:, None] if transposed else x[None, :]

    lower, carried, last, survives = i >= j, None, None, None
    if "first" in refs:
        first, first_end = refs["first"][tokens], refs["first_end"][c]
        lower &= of_queries(first) <= j
        carried = first < 0
        last = jax.lax.broadcasted_iota(jnp.int32, (C,), 0) >= first_end
        survives = first_end < 0
    if "coarse" not in refs:
        into, out, kept = (None if x is None else x.astype(jnp.float32) for x in (carried, last, survives))
        return Factors(lower.astype(jnp.float32), into, out, kept)

    def exp(x: Array, where: Array | None) -> Array:
        return jnp.exp(x if where is None else jnp.where(where, x, -jnp.inf))

    coarse, fine = refs["coarse"][tokens], refs["fine"][tokens]
    coarse_end, fine_end = refs["coarse"][c * C + C - 1], refs["fine"][c * C + C - 1]
    pair = (of_queries(coarse) - of_keys(coarse)) + (of_queries(fine) - of_keys(fine))
    return Factors(
        pair=exp(pair, lower),
        into=exp(coarse + fine, carried),
        out=exp((coarse_end - coarse) + (fine_end - fine), last),
        kept=exp(coarse_end + fine_end, survives),
    )


def kept_decay(refs: Refs, c: Array, C: int) -> Array:
    """The `kept` of `factors` alone, for calls with decays."""
    kept = refs["coarse"][c * C + C - 1] + refs["fine"][c * C + C - 1]
    return jnp.exp(kept if "first" not in refs else jnp.where(refs["first_end"][c] < 0, kept, -jnp.inf))


def _forward_kernel(refs: Refs, *, scale: float, C: int, J: int, stride: int | None, shape: tuple[int, int]) -> None:
    def chunk(c: Array, state: Array) -> Array:
        tokens = pl.ds(c * C, C)
        q, k, v = refs["q"][tokens, :], refs["k"][tokens, :], refs["v"][tokens, :]
        f = factors(refs, c, C)
        u = refs["u"][tokens] if "u" in refs else None
        scores = dot(q, k, (1, 1)) * f.pair
        if u is not None:
            scores = scores * u[None, :]
        o = dot(scores.astype(v.dtype), v) + rows(dot(q, state.astype(q.dtype)), f.into)
        refs["o"][tokens, :] = (scale * o).astype(v.dtype)
        return update(state, f.kept, k, rows(v, u, f.out).astype(k.dtype))

    def leave(anchor: Array, state: Array) -> Array:
        refs["states"][anchor] = state
        return state

    by = walks.groups(J, stride) if stride else None
    state = walks.walk(J, chunk, walks.initial(refs, "state", shape), by=by, before=leave)
    if "final" in refs:
        refs["final"][...] = state


def _queries_kernel(refs: Refs, *, scale: float, C: int, J: int, stride: int, shape: tuple[int, int]) -> None:
    def chunk(c: Array, state: Array) -> Array:
        tokens = pl.ds(c * C, C)
        k, v, do = refs["k"][tokens, :], refs["v"][tokens, :], refs["do"][tokens, :]
        f = factors(refs, c, C)
        u = refs["u"][tokens] if "u" in refs else None
        d_scores = scale * dot(do, v, (1, 1)) * f.pair
        if u is not None:
            d_scores = d_scores * u[None, :]
        inter = scale * rows(dot(do, state.astype(do.dtype), (1, 1)), f.into)
        dq = dot(d_scores.astype(k.dtype), k) + inter
        refs["dq"][tokens, :] = dq.astype(refs["dq"].dtype)
        if "pairs" in refs:
            q = refs["q"][tokens, :]
            refs["reads"][tokens] = jnp.sum(q.astype(jnp.float32) * inter, axis=1)
            refs["pairs"][tokens] = pair_gradient(d_scores * dot(q, k, (1, 1)))
        return update(state, f.kept, k, rows(v, u, f.out).astype(k.dtype))

    def leave(n: Array, state: Array) -> Array:
        refs["anchors"][jnp.maximum(n - 1, 0)] = state
        return state

    by = walks.groups_between_last(J, stride) if "anchors" in refs else None
    walks.walk(J, chunk, walks.initial(refs, "state", shape), by=by, before=leave)


def pair_gradient(weight: Array) -> Array:
    """(C,): for each token t, the sum of the (i, j) weights of pairs that its decay lies between, j < t <= i.

    Summed pair by pair: by way of sums over all queries or keys it would be a small difference of large numbers.
    """
    i, t = (jax.lax.broadcasted_iota(jnp.int32, weight.shape, n) for n in (0, 1))
    weight = jnp.where(i > t, weight, 0.0)
    earlier = jnp.cumsum(weight, axis=1) - weight
    return jnp.sum(jnp.where(i >= t, earlier, 0.0), axis=0)


def _keys_kernel(refs: Refs, *, scale: float, C: int, J: int, stride: int, shape: tuple[int, int]) -> None:
    def chunk(c: Array, d_state: Array) -> Array:
        tokens = pl.ds(c * C, C)
        q, v, do = refs["q"][tokens, :], refs["v"][tokens, :], refs["do"][tokens, :]
        f = factors(refs, c, C, transposed=True)
        u = refs["u"][tokens] if "u" in refs else None
        d_scores = scale * rows(dot(v, do, (1, 1)) * f.pair, u)
        inter = rows(dot(v, d_state.astype(v.dtype), (1, 1)), u, f.out)
        dk = dot(d_scores.astype(q.dtype), q) + inter
        refs["dk"][tokens, :] = dk.astype(refs["dk"].dtype)
        if "writes" in refs:
            refs["writes"][tokens] = jnp.sum(refs["k"][tokens, :].astype(jnp.float32) * inter, axis=1)
        return update(d_state, f.kept, q, (scale * rows(do, f.into)).astype(q.dtype))

    def meet(n: Array, d_state: Array) -> Array:
        if "through" in refs:
            kept = kept_decay(refs, by.bounds(n)[1] - 1, C)
            refs["through"][n] = kept * jnp.sum(refs["anchors"][n] * d_state)
        return d_state

    def add(n: Array, d_state: Array) -> Array:
        return d_state + refs["d_states"][n] if "d_states" in refs else d_state

    by = walks.groups(J, stride)
    grouped = by if "d_states" in refs or "through" in refs else None
    walks.walk(J, chunk, walks.initial(refs, "d_final", shape), by=grouped, before=meet, after=add, reverse=True)


def _values_kernel(refs: Refs, *, scale: float, C: int, J: int, stride: int | None, shape: tuple[int, int]) -> None:
    def chunk(c: Array, d_state: Array) -> Array:
        tokens = pl.ds(c * C, C)
        q, k, do = refs["q"][tokens, :], refs["k"][tokens, :], refs["do"][tokens, :]
        f = factors(refs, c, C, transposed=True)
        scores = scale * dot(k, q, (1, 1)) * f.pair
        d_write = dot(scores.astype(do.dtype), do) + rows(dot(k, d_state.astype(k.dtype)), f.out)
        u = refs["u"][tokens] if "u" in refs else None
        refs["dv"][tokens, :] = rows(d_write, u).astype(refs["dv"].dtype)
        if "du" in refs:
            refs["du"][tokens] = jnp.sum(refs["v"][tokens, :].astype(jnp.float32) * d_write, axis=1)
        return update(d_state, f.kept, q, (scale * rows(do, f.into)).astype(q.dtype))

    def add(n: Array, d_state: Array) -> Array:
        return d_state + refs["d_states"][n]

    by = walks.groups(J, stride) if stride and "d_states" in refs else None
    d_state = walks.walk(J, chunk, walks.initial(refs, "d_final", shape), by=by, after=add, reverse=True)
    if "d_initial" in refs:
        refs["d_initial"][...] = d_state


def forward(settings: Settings, arrays: Arrays, segment_ids: Array | None) -> tuple[Array, Array | None, Array | None]:
    documents, place = given.documents(segment_ids, settings.chunk)
    at = Layout(settings, arrays, "forward")
    inputs: dict[str, Any] = {} if arrays.state is None else {"state": (arrays.state, at.state())}
    outputs, stride = tools.forward_outputs(settings, arrays, at), settings.state_stride
    found = tools.sweep(settings, arrays, documents, at, _forward_kernel, inputs, outputs, stride, place)
    return found["o"], found.get("final"), found.get("states")


def backward(
    settings: Settings,
    arrays: Arrays,
    segment_ids: Array | None,
    do: Array,
    d_final: Array | None,
    d_states: Array | None,
) -> Arrays:
    documents, place = given.documents(segment_ids, settings.chunk)
    (B, T, H, _), (Hk, K) = arrays.v.shape, arrays.q.shape[2:]
    stride, number = settings.anchor, -(-(T // settings.chunk) // settings.anchor)
    decayed = arrays.g is not None
    # A query/key head that several value heads read has its gradient summed over them, in float32.
    d_key = jax.ShapeDtypeStruct((B, T, H, K), arrays.q.dtype if Hk == H else jnp.float32)

    at = Layout(settings, arrays, "queries")
    inputs: dict[str, Any] = {"do": (do, at.values())}
    outputs: dict[str, Any] = {"dq": (d_key, at.keys(H))}
    if arrays.state is not None:
        inputs["state"] = arrays.state, at.state()
    if decayed:
        outputs |= {"reads": at.partial(T), "pairs": at.partial(T)}
        outputs["anchors"] = at.states_out(number)
    of_queries = tools.sweep(settings, arrays, documents, at, _queries_kernel, inputs, outputs, stride, place)

    at = Layout(settings, arrays, "keys")
    inputs = {"do": (do, at.values())} | tools.state_gradients(at, d_final, d_states)
    outputs = {"dk": (d_key, at.keys(H))}
    if decayed:
        inputs["anchors"] = of_queries["anchors"], at.states(number)
        outputs |= {"writes": at.partial(T), "through": at.partial(number)}
    of_keys = tools.sweep(settings, arrays, documents, at, _keys_kernel, inputs, outputs, stride, place)

    at = Layout(settings, arrays, "values")
    inputs = {"do": (do, at.values())} | tools.state_gradients(at, d_final, d_states)
    outputs = tools.values_outputs(settings, arrays, at)
    of_values = tools.sweep(settings, arrays, documents, at, _values_kernel, inputs, outputs, stride, place)

    return Arrays(
        q=given.by_key_head(of_queries["dq"], arrays.q),
        k=given.by_key_head(of_keys["dk"], arrays.k),
        v=of_values["dv"],
        g=given.decay_gradient(of_queries, of_keys, documents, settings.chunk, stride) if decayed else None,
        u=tools.write_gradient(settings, arrays, of_values),
        state=of_values.get("d_initial"),
    )
