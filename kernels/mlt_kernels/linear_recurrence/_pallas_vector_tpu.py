"""Both rules with one decay a head and key dim, in Mosaic kernels for a TPU: GLA (arXiv 2312.06635) and KDA (2510.26692).

The mathematics is that of `_pallas_delta_tpu` with decays inside the products, which `_pallas_levels_tpu` makes; under the add
rule a chunk writes W = beta V. Forward: one kernel. Backward: the same kernel again leaves the states that enter the chunks and
what these write (under the delta rule the inverses too), then `_reverse_kernel` walks from the last chunk to the first. Nothing
but the inputs is kept between the passes.

Letters: B rows, T tokens, J chunks, C tokens of a chunk (i as query, j as key), H value heads, K key dim, V value dim.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from mlt_kernels.linear_recurrence import _kernel_inputs as given
from mlt_kernels.linear_recurrence import _pallas_levels_tpu as pairs
from mlt_kernels.linear_recurrence import _pallas_tools as tools
from mlt_kernels.linear_recurrence._kernel_inputs import Arrays
from mlt_kernels.linear_recurrence._pallas_delta_parts import fine_dot, low_dot
from mlt_kernels.linear_recurrence._pallas_delta_tpu import solved, unit_inverse
from mlt_kernels.linear_recurrence._pallas_tools import Refs, Settings
from mlt_kernels.linear_recurrence._pallas_tpu_tools import (
    ROWS,
    Layout,
    add_cotangent,
    dot,
    factors,
    finish,
    gate_tiles,
    heads_first,
    keep,
    operands,
    row_sums,
    run_forward,
    start,
)


class Chunk(NamedTuple):
    """Decays, borders and write strengths of one chunk."""

    levels: list[pairs.Level]
    meet: Array  # (C, C) 1 where key j is not after query i and in its document, else 0
    into: Array  # (C, K) from the chunk's start to i
    out: Array  # (C, K) from j to the chunk's end
    kept: Array  # (1, K) of the state that entered
    write: Array  # (C, 1)


def _chunk(refs: Refs) -> Chunk:
    f, levels = factors(refs["gates"][...]), pairs.levels(refs["g"][...])
    C, whole = f.pair.shape[0], levels[-1]
    kept = f.kept * jnp.exp(whole.before[C - 1 :])
    return Chunk(levels, f.pair, f.into * jnp.exp(whole.before), f.out * jnp.exp(whole.after), kept, f.write)


def _rows_times(column: Array, state: Array) -> Array:
    """state (K, V) with its rows times the numbers of (1, K)."""
    return jnp.broadcast_to(column, (ROWS, column.shape[1])).T[:, :1] * state


def _scores(q: Array, k: Array, f: Chunk, decayed: Array) -> Array:
    """(C, C) of what each query reads of each write: `decayed` below the diagonal, and the token itself."""
    i, j = (jax.lax.broadcasted_iota(jnp.int32, decayed.shape, n) for n in (0, 1))
    itself = jnp.sum(q.astype(jnp.float32) * k, axis=1, keepdims=True)
    return (decayed + jnp.where(i == j, itself, 0.0)) * f.meet


def _forward_kernel(refs: Refs, state: Any, *, scale: float, J: int, stride: int, delta: bool) -> None:
    start(refs, "state", state)
    k, v, f = refs["k"][...], refs["v"][...], _chunk(refs)
    entering, low = state[...], refs["k"].dtype
    product = fine_dot if delta else low_dot
    sides = ([refs["q"][...]] if "o" in refs else []) + ([k] if delta else [])
    decayed = pairs.products(sides, k, f.levels, product)
    write = f.write * v
    if delta:
        strict = f.write * decayed[-1] * f.meet
        inverse = unit_inverse(strict)
        write -= f.write * product(k * f.into, entering.astype(low), low)
        write = solved(inverse, strict if low == jnp.float32 else None, write)
        if "inverse" in refs:
            refs["inverse"][...] = inverse
    keep(refs, entering, stride)
    if "write" in refs:
        refs["write"][...] = write.astype(refs["write"].dtype)
    if "o" in refs:
        q = refs["q"][...]
        inside = product(_scores(q, k, f, decayed[0]), write, low)
        o = dot((q * f.into).astype(low), entering.astype(low)) + inside
        refs["o"][...] = (scale * o).astype(v.dtype)
    state[...] = _rows_times(f.kept, entering) + product(k * f.out, write, low, (0, 0))
    finish(refs, "final", state, J)


def _reverse_kernel(refs: Refs, d_state: Any, *, scale: float, J: int, stride: int, delta: bool) -> None:
    start(refs, "d_final", d_state)
    q, k, v, do, f = refs["q"][...], refs["k"][...], refs["v"][...], refs["do"][...], _chunk(refs)
    entering, write, low = refs["entering"][...], refs["write"][...], refs["k"].dtype
    leaving, product = d_state[...], fine_dot if delta else low_dot
    C = k.shape[0]
    sides = [q, k] if delta else [q]
    decayed = pairs.products(sides, k, f.levels, product)
    scores = _scores(q, k, f, decayed[0])
    d_write = scale * product(scores, do, low, (0, 0)) + product(k * f.out, leaving.astype(low), low)
    read_q = scale * f.into * dot(do, entering, (1, 1))
    left = f.out * product(write, leaving.astype(low), low, (1, 1))
    d_scores = scale * product(do, write, low, (1, 1)) * f.meet
    d_products, d_before = [d_scores], q * read_q
    d_state[...] = _rows_times(f.kept, leaving) + dot((q * f.into).astype(low), (scale * do).astype(low), (0, 0))
    refs["felt"][...] = jnp.zeros_like(refs["felt"])
    pull, d_k = d_write, left
    if delta:
        overlap = decayed[1] * f.meet
        strict = f.write * overlap if low == jnp.float32 else None
        pull = solved(refs["inverse"][...], strict, d_write, transposed=True)
        read_k = f.into * product(pull, entering, low, (1, 1))
        d_overlap = -product(pull, write, low, (1, 1))
        d_products.append(d_overlap * f.write * f.meet)
        d_before -= k * (f.write * read_k)
        d_k -= f.write * read_k
        refs["felt"][0:1, :] = row_sums(d_overlap * overlap) - row_sums(k * read_k)
        d_state[...] -= product(k * f.into, f.write * pull, low, (0, 0))
    refs["dv"][...] = (f.write * pull).astype(refs["dv"].dtype)
    refs["felt"][0:1, :] += row_sums(pull * v)

    survived = f.kept * row_sums(entering.astype(jnp.float32) * leaving)
    last = jax.lax.broadcasted_iota(jnp.int32, (C, 1), 0) == C - 1
    d_before += jnp.where(last, survived, 0.0)
    d_sides, of_pairs, d_g = pairs.gradients(sides, d_products, k, f.levels, d_before, k * left, product)
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (C, C), n) for n in (0, 1))
    itself = jnp.sum(jnp.where(i == j, d_scores, 0.0), axis=1, keepdims=True)
    d_k += of_pairs + itself * q
    refs["dq"][...] = (read_q + d_sides[0] + itself * k).astype(refs["dq"].dtype)
    refs["dk"][...] = sum(d_sides[1:], d_k).astype(refs["dk"].dtype)
    refs["dg"][...] = d_g
    add_cotangent(refs, d_state, J - 1 - pl.program_id(2), stride)
    finish(refs, "d_initial", d_state, J)


def _inputs(settings: Settings, arrays: Arrays, at: Layout, segment_ids: Array | None) -> dict[str, Any]:
    assert arrays.g is not None
    documents, place = given.documents(segment_ids, settings.chunk)
    inputs = operands(arrays, at, gate_tiles(settings, arrays._replace(g=None), documents, place))
    return inputs | {"g": (heads_first(arrays.g), at.tokens(at.H, at.K))}


def forward(settings: Settings, arrays: Arrays, segment_ids: Array | None) -> tuple[Array, Array | None, Array | None]:
    at = Layout(settings, arrays)
    kernel = functools.partial(_forward_kernel, delta=settings.rule == "delta")
    return run_forward(settings, arrays, at, kernel, _inputs(settings, arrays, at, segment_ids))


def backward(
    settings: Settings,
    arrays: Arrays,
    segment_ids: Array | None,
    do: Array,
    d_final: Array | None,
    d_states: Array | None,
) -> Arrays:
    delta, low = settings.rule == "delta", arrays.k.dtype
    at = Layout(settings, arrays)
    inputs = _inputs(settings, arrays, at, segment_ids)
    del inputs["q"]
    if arrays.state is not None:
        inputs["state"] = arrays.state, at.state()
    outputs = {"states": at.states(1, low), "write": at.output(at.H, at.V, jnp.float32 if delta else low)}
    if delta:
        outputs["inverse"] = at.square()
    kept = at.launch(functools.partial(_forward_kernel, delta=delta), inputs, outputs, 1)

    at = Layout(settings, arrays, reverse=True)
    # A query/key head that several value heads read has its gradient summed over them, in float32.
    key_dtype = low if at.Hk == at.H else jnp.float32
    inputs = _inputs(settings, arrays, at, segment_ids) | {
        "do": (heads_first(do), at.tokens(at.H, at.V)),
        "entering": (kept["states"], at.states(1)[1]),
        "write": (kept["write"], at.tokens(at.H, at.V)),
    }
    if delta:
        inputs["inverse"] = kept["inverse"], at.square()[1]
    if d_final is not None:
        inputs["d_final"] = d_final, at.state()
    stride = settings.state_stride or 1
    if d_states is not None:
        inputs["d_states"] = d_states, at.states(stride)[1]
    outputs = {
        "dq": at.output(at.H, at.K, key_dtype),
        "dk": at.output(at.H, at.K, key_dtype),
        "dv": at.output(at.H, at.V, arrays.v.dtype),
        "dg": at.output(at.H, at.K, jnp.float32),
        "felt": at.felt(),
    }
    if arrays.state is not None:
        outputs["d_initial"] = at.whole_state()
    grads = at.launch(functools.partial(_reverse_kernel, delta=delta), inputs, outputs, stride)
    d_write = grads["felt"][:, :, :, 0].reshape(1, at.B, at.H, at.T)
    return Arrays(
        q=given.by_key_head(heads_first(grads["dq"]), arrays.q),
        k=given.by_key_head(heads_first(grads["dk"]), arrays.k),
        v=heads_first(grads["dv"]),
        g=heads_first(grads["dg"]),
        u=tools.write_gradient(settings, arrays, {"du": d_write}),
        state=grads.get("d_initial"),
    )
