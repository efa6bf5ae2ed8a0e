"""The add rule with one decay a head and key dim, in Triton kernels.

Chunks are 16 tokens, so that the decayed scores inside a chunk, which no product of two matrices gives without exponents
above 0, stay few. Two token-parallel kernels make them, one key at a time and element by element: `pairs` the (16, 16)
scores, for the forward pass and for dv; `inner` what they feel, dq, dk and dg, in one go. The sweeps are those of
`_pallas_add_scalar`: `forward`, `queries`, `keys` and `values` walk over the chunks with a slab of the state in registers,
recompute it in the backward pass, and add their share to what `inner` found. `queries` leaves one chunk's entering state
in 16 to `keys`, and each chunk's reads, a (K,) vector, from which `keys` knows what the states feel in between.

Every exponent is a sum of log decays of one document between two tokens, or a difference of such sums taken in exact parts
(multiples of 1/256, and a rest): nothing overflows and nothing is lost beside a strong decay.

Letters: B rows, T tokens, J chunks, C = 16 tokens of a chunk (i as query, j as key), H value heads, K key dim, V value dim.
In a kernel: u = write strength, W = the K of the program's slab.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from mlt_kernels.linear_recurrence import _kernel_inputs as given
from mlt_kernels.linear_recurrence import _pallas_tools as tools
from mlt_kernels.linear_recurrence import _pallas_walk as walks
from mlt_kernels.linear_recurrence._kernel_inputs import Arrays
from mlt_kernels.linear_recurrence._pallas_tools import Layout, Refs, Settings, dot, rows


class Factors(NamedTuple):
    """Decays of one chunk."""

    into: Array  # (C, W) from the chunk's start to i, 0 in documents that start later
    out: Array  # (C, W) from j to the chunk's end, 0 in documents that end earlier
    kept: Array  # (W,) of the state that entered, 0 if its document ended


def _indices(C: int, D: int) -> tuple[Array, Array]:
    return jax.lax.broadcasted_iota(jnp.int32, (C, D), 0), jax.lax.broadcasted_iota(jnp.int32, (C, D), 1)


def _sums(mask: Array, x: Array) -> Array:
    """(C, W): for each row of the mask, the sum of the rows of x that it names, in full float32."""
    return tools.full_dot(mask.astype(jnp.float32), x)


def factors(refs: Refs, c: Array, C: int) -> Factors:
    g = refs["g"][pl.ds(c * C, C), :]
    row, column = _indices(C, C)
    into, out, kept = _sums(column <= row, g), _sums(column > row, g), jnp.sum(g, axis=0)
    if "first" in refs:
        first, first_end = refs["first"][pl.ds(c * C, C)], refs["first_end"][c]
        place = jax.lax.broadcasted_iota(jnp.int32, (C,), 0)
        into = jnp.where((first < 0)[:, None], into, -jnp.inf)
        out = jnp.where((place >= first_end)[:, None], out, -jnp.inf)
        kept = jnp.where(first_end < 0, kept, -jnp.inf)
    return Factors(jnp.exp(into), jnp.exp(out), jnp.exp(kept))


def _meets(refs: Refs, c: Array, C: int) -> tuple[Array, Array]:
    """(C,) twice: places of the tokens, and the first keys that they meet as queries."""
    place = jax.lax.broadcasted_iota(jnp.int32, (C,), 0)
    return place, refs["first"][pl.ds(c * C, C)] if "first" in refs else jnp.zeros_like(place)


def _pairs_kernel(refs: Refs, *, C: int, K: int) -> None:
    """scores[i, j] = sum_k q_i k_j exp(g_{j+1} + .. + g_i), 0 where they do not meet."""
    c = pl.program_id(0)
    q = refs["q"][pl.ds(c * C, C), :].astype(jnp.float32)
    place, first = _meets(refs, c, C)
    _, column = _indices(C, C)

    def key(n: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        decay, scores = carry
        j = C - 1 - n
        k = refs["k"][c * C + j, :].astype(jnp.float32)
        meets = (place >= j) & (first <= j)
        weights = jnp.exp(jnp.where(meets[:, None], decay, -jnp.inf))
        score = jnp.sum(q * k[None, :] * weights, axis=1)
        scores = jnp.where(column == j, score[:, None], scores)
        return jnp.where((place >= j)[:, None], decay + refs["g"][c * C + j, :][None, :], 0.0), scores

    start = jnp.zeros((C, K), jnp.float32), jnp.zeros((C, C), jnp.float32)
    refs["pairs"][pl.ds(c * C, C), :] = jax.lax.fori_loop(0, C, key, start)[1]


def _inner_kernel(refs: Refs, *, scale: float, C: int, K: int) -> None:
    """Gradients of the scores inside a chunk in q, k and g."""
    c = pl.program_id(0)
    tokens = pl.ds(c * C, C)
    q, v, do = refs["q"][tokens, :].astype(jnp.float32), refs["v"][tokens, :], refs["do"][tokens, :]
    place, first = _meets(refs, c, C)
    row, column = _indices(C, C)
    d_scores = scale * dot(do, v, (1, 1))
    if "u" in refs:
        d_scores = d_scores * refs["u"][tokens][None, :]
    g = refs["g"][tokens, :]
    coarse = jnp.floor(g * given.GRID) / given.GRID
    within = (column <= row) & (first[:, None] <= column)
    sums = _sums(within, coarse), _sums(within, g - coarse)

    def key(j: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        coarse, fine, dq, felt = carry
        k, own = refs["k"][c * C + j, :].astype(jnp.float32), refs["g"][c * C + j, :]
        own_coarse = jnp.floor(own * given.GRID) / given.GRID
        meets = ((place >= j) & (first <= j))[:, None]
        # What is left of the sums from each query's document's or the chunk's start: from the key to the query.
        coarse = coarse - jnp.where(meets, own_coarse[None, :], 0.0)
        fine = fine - jnp.where(meets, (own - own_coarse)[None, :], 0.0)
        d_score = jnp.sum(jnp.where(column == j, d_scores, 0.0), axis=1)
        weights = d_score[:, None] * jnp.exp(jnp.where(meets, coarse + fine, -jnp.inf))
        dq = dq + weights * k[None, :]
        weights = weights * q
        refs["dk"][c * C + j, :] = jnp.sum(weights, axis=0)
        # Token t lies between the keys before it and the queries from it on.
        later = (place >= j)[:, None]
        refs["dg"][c * C + j, :] = jnp.sum(jnp.where(later, felt, 0.0), axis=0)
        return coarse, fine, dq, felt + jnp.where((place > j)[:, None], weights * k[None, :], 0.0)

    zero = jnp.zeros((C, K), jnp.float32)
    refs["dq"][tokens, :] = jax.lax.fori_loop(0, C, key, (*sums, zero, zero))[2]


def _update(state: Array, kept: Array, left: Array, right: Array) -> Array:
    return dot(left, right, (0, 0)) + kept[:, None] * state


def _forward_kernel(refs: Refs, *, scale: float, C: int, J: int, stride: int | None, shape: tuple[int, int]) -> None:
    def chunk(c: Array, state: Array) -> Array:
        tokens = pl.ds(c * C, C)
        q, k, v = refs["q"][tokens, :], refs["k"][tokens, :], refs["v"][tokens, :]
        f = factors(refs, c, C)
        scores, out = refs["pairs"][tokens, :], f.out
        if "u" in refs:
            u = refs["u"][tokens]
            scores, out = scores * u[None, :], out * u[:, None]
        o = dot(scores.astype(v.dtype), v) + dot((q * f.into).astype(q.dtype), state.astype(q.dtype))
        refs["o"][tokens, :] = (scale * o).astype(v.dtype)
        return _update(state, f.kept, (k * out).astype(k.dtype), v)

    def leave(anchor: Array, state: Array) -> Array:
        refs["states"][anchor] = state
        return state

    by = walks.groups(J, stride) if stride else None
    state = walks.walk(J, chunk, walks.initial(refs, "state", shape), by=by, before=leave)
    if "final" in refs:
        refs["final"][...] = state


def _queries_kernel(refs: Refs, *, scale: float, C: int, J: int, stride: int, shape: tuple[int, int]) -> None:
    row, column = _indices(C, C)

    def chunk(c: Array, state: Array) -> Array:
        tokens = pl.ds(c * C, C)
        q, k, v, do = (refs[x][tokens, :] for x in ("q", "k", "v", "do"))
        f = factors(refs, c, C)
        inter = scale * dot(do, state.astype(do.dtype), (1, 1)) * f.into
        refs["dq"][tokens, :] = (refs["dq_inner"][tokens, :] + inter).astype(refs["dq"].dtype)
        reads = q.astype(jnp.float32) * inter
        refs["reads"][c, :] = jnp.sum(reads, axis=0)
        refs["dg"][tokens, :] = refs["dg_inner"][tokens, :] + _sums(column >= row, reads)
        out = f.out if "u" not in refs else f.out * refs["u"][tokens][:, None]
        return _update(state, f.kept, (k * out).astype(k.dtype), v)

    def leave(n: Array, state: Array) -> Array:
        refs["anchors"][jnp.maximum(n - 1, 0)] = state
        return state

    by = walks.groups_between_last(J, stride)
    walks.walk(J, chunk, walks.initial(refs, "state", shape), by=by, before=leave)


def _keys_kernel(refs: Refs, *, scale: float, C: int, J: int, stride: int, shape: tuple[int, int]) -> None:
    row, column = _indices(C, C)

    def chunk(c: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        d_state, felt = carry
        tokens = pl.ds(c * C, C)
        q, k, v, do = (refs[x][tokens, :] for x in ("q", "k", "v", "do"))
        f = factors(refs, c, C)
        out = f.out if "u" not in refs else f.out * refs["u"][tokens][:, None]
        inter = dot(v, d_state.astype(v.dtype), (1, 1)) * out
        refs["dk"][tokens, :] = (refs["dk_inner"][tokens, :] + inter).astype(refs["dk"].dtype)
        writes = k.astype(jnp.float32) * inter
        # What passes the whole chunk: known in a group's last; else what felt the state after it, less what was written.
        through = jnp.where((jax.lax.rem(c, stride) == stride - 1) | (c == J - 1), f.kept * felt, felt - jnp.sum(writes, axis=0))
        if "first" in refs:
            through = jnp.where(refs["first_end"][c] < 0, through, 0.0)
        refs["dg"][tokens, :] = refs["dg_queries"][tokens, :] + _sums(column < row, writes) + through[None, :]
        d_state = _update(d_state, f.kept, (scale * q * f.into).astype(q.dtype), do)
        return d_state, through + refs["reads"][c, :]

    def meet(n: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        return carry[0], jnp.sum(refs["anchors"][n] * carry[0], axis=1)

    def add(n: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        return (carry[0] + refs["d_states"][n] if "d_states" in refs else carry[0]), carry[1]

    start = walks.initial(refs, "d_final", shape), jnp.zeros(shape[:1], jnp.float32)
    walks.walk(J, chunk, start, by=walks.groups(J, stride), before=meet, after=add, reverse=True)


def _values_kernel(refs: Refs, *, scale: float, C: int, J: int, stride: int | None, shape: tuple[int, int]) -> None:
    def chunk(c: Array, d_state: Array) -> Array:
        tokens = pl.ds(c * C, C)
        q, k, do = refs["q"][tokens, :], refs["k"][tokens, :], refs["do"][tokens, :]
        f = factors(refs, c, C)
        scores = (scale * refs["pairs"][tokens, :]).astype(do.dtype)
        d_write = dot(scores, do, (0, 0)) + dot((k * f.out).astype(k.dtype), d_state.astype(k.dtype))
        u = refs["u"][tokens] if "u" in refs else None
        refs["dv"][tokens, :] = rows(d_write, u).astype(refs["dv"].dtype)
        if "du" in refs:
            refs["du"][tokens] = jnp.sum(refs["v"][tokens, :].astype(jnp.float32) * d_write, axis=1)
        return _update(d_state, f.kept, (scale * q * f.into).astype(q.dtype), do)

    def add(n: Array, d_state: Array) -> Array:
        return d_state + refs["d_states"][n]

    by = walks.groups(J, stride) if stride and "d_states" in refs else None
    d_state = walks.walk(J, chunk, walks.initial(refs, "d_final", shape), by=by, after=add, reverse=True)
    if "d_initial" in refs:
        refs["d_initial"][...] = d_state


def forward(settings: Settings, arrays: Arrays, segment_ids: Array | None) -> tuple[Array, Array | None, Array | None]:
    documents, _ = given.documents(segment_ids, settings.chunk)
    pairs = _pairs(settings, arrays, documents)
    at = Layout(settings, arrays, "forward")
    outputs = tools.forward_outputs(settings, arrays, at)
    inputs: dict[str, Any] = {"pairs": (pairs, _of_pairs(at))}
    if arrays.state is not None:
        inputs["state"] = arrays.state, at.state()
    found = tools.sweep(settings, arrays, documents, at, _forward_kernel, inputs, outputs, settings.state_stride)
    return found["o"], found.get("final"), found.get("states")


def backward(
    settings: Settings,
    arrays: Arrays,
    segment_ids: Array | None,
    do: Array,
    d_final: Array | None,
    d_states: Array | None,
) -> Arrays:
    documents, _ = given.documents(segment_ids, settings.chunk)
    (B, T, H, _), (Hk, K) = arrays.v.shape, arrays.q.shape[2:]
    stride, number = settings.anchor, -(-(T // settings.chunk) // settings.anchor)
    wide = jax.ShapeDtypeStruct((B, T, H, K), jnp.float32)
    # A query/key head that several value heads read has its gradient summed over them, in float32.
    d_key = jax.ShapeDtypeStruct((B, T, H, K), arrays.q.dtype) if Hk == H else wide

    at = Layout(settings, arrays, "inner")
    inner = tools.launch(
        functools.partial(_inner_kernel, scale=settings.scale, C=at.chunk, K=K),
        grid=at.grid,
        inputs=tools.operands(arrays, at) | {"do": (do, at.values())} | at.gates(arrays, documents, None),
        outputs={name: (wide, at.keys(H)) for name in ("dq", "dk", "dg")},
        sizes=at.sizes,
    )

    at = Layout(settings, arrays, "queries")
    inputs: dict[str, Any] = {"do": (do, at.values())}
    inputs |= {"dq_inner": (inner["dq"], at.keys(H)), "dg_inner": (inner["dg"], at.keys(H))}
    outputs: dict[str, Any] = {"dq": (d_key, at.keys(H)), "dg": (wide, at.keys(H)), "reads": at.key_sums(at.chunks)}
    if arrays.state is not None:
        inputs["state"] = arrays.state, at.state()
    outputs["anchors"] = at.states_out(number)
    of_queries = tools.sweep(settings, arrays, documents, at, _queries_kernel, inputs, outputs, stride)

    at = Layout(settings, arrays, "keys")
    inputs = {"do": (do, at.values()), "reads": (of_queries["reads"], at.key_sums(at.chunks)[1])}
    inputs |= {"dk_inner": (inner["dk"], at.keys(H)), "dg_queries": (of_queries["dg"], at.keys(H))}
    inputs["anchors"] = of_queries["anchors"], at.states(number)
    inputs |= tools.state_gradients(at, d_final, d_states)
    outputs = {"dk": (d_key, at.keys(H)), "dg": (wide, at.keys(H))}
    of_keys = tools.sweep(settings, arrays, documents, at, _keys_kernel, inputs, outputs, stride)

    at = Layout(settings, arrays, "values")
    inputs = {"do": (do, at.values()), "pairs": (_pairs(settings, arrays, documents), _of_pairs(at))}
    inputs |= tools.state_gradients(at, d_final, d_states)
    outputs = tools.values_outputs(settings, arrays, at)
    of_values = tools.sweep(settings, arrays, documents, at, _values_kernel, inputs, outputs, stride)

    return Arrays(
        q=given.by_key_head(of_queries["dq"], arrays.q),
        k=given.by_key_head(of_keys["dk"], arrays.k),
        v=of_values["dv"],
        g=of_keys["dg"],
        u=tools.write_gradient(settings, arrays, of_values),
        state=of_values.get("d_initial"),
    )


def _pairs(settings: Settings, arrays: Arrays, documents: given.Documents | None) -> Array:
    """(B, H, T, C) float32."""
    at = Layout(settings, arrays, "pairs")
    operands = tools.operands(arrays, at)
    shape = jax.ShapeDtypeStruct((at.B, at.H, at.T, at.chunk), jnp.float32)
    found = tools.launch(
        functools.partial(_pairs_kernel, C=at.chunk, K=at.K),
        grid=at.grid,
        inputs={"q": operands["q"], "k": operands["k"]} | at.gates(arrays, documents, None),
        outputs={"pairs": (shape, _of_pairs(at))},
        sizes=at.sizes,
    )
    return found["pairs"]


def _of_pairs(at: Layout) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, at.T, at.chunk), lambda x, h, b: (b, h, 0, 0))
