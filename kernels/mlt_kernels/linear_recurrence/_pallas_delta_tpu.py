"""The delta rule with no decay or one decay a head, in Mosaic kernels for a TPU: DeltaNet (arXiv 2406.06484) and gated delta
(2412.06464).

Per chunk, entered with state S, with D the decays between tokens and G their sums since the chunk began,

    M  = strictly lower (beta_i k_i . k_j D_ij)       T = (I + M)^-1
    W  = T beta (V - exp(G) K S)                      what is written
    O  = scale (exp(G) Q S + (Q K^T . D) W)
    S' = exp(G_end) S + (exp(G_end - G) K)^T W

Forward: one kernel, T included. Backward: the same kernel again leaves S, T and W of every chunk, then `_reverse_kernel` walks
from the last chunk to the first. With dO the cotangent of the output and dS' of the state that leaves a chunk,

    dW = scale (Q K^T . D)^T dO + exp(G_end - G) K dS'
    X  = T^T dW                                       the gradient of beta (V - reads)
    dS = exp(G_end) dS' + scale (exp(G) Q)^T dO - (exp(G) K)^T beta X

and the gradient of M is -X W^T: the inverse itself is never differentiated. Nothing but the inputs is kept between the passes;
S, T and W live in the backward pass alone, K V / C + C + V numbers a token and head. T and W are float32 beside bfloat16 operands
too, and so is what sums over tokens take: see `_pallas_delta_parts`.

Letters: B rows, T tokens, J chunks, C tokens of a chunk (i as query, j as key), H value heads, K key dim, V value dim.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from mlt_kernels.linear_recurrence import _kernel_inputs as given
from mlt_kernels.linear_recurrence import _pallas_tools as tools
from mlt_kernels.linear_recurrence._kernel_inputs import Arrays
from mlt_kernels.linear_recurrence._pallas_delta_parts import fine_dot
from mlt_kernels.linear_recurrence._pallas_tools import Refs, Settings
from mlt_kernels.linear_recurrence._pallas_tpu_tools import (
    Chunk,
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

LEAF = 16
"""Tokens of a block whose inverse is made by forward substitution."""


def unit_inverse(strict: Array) -> Array:
    """(I + M)^-1 for M (C, C) float32, strictly lower triangular, C a power of two.

    Blocks of 16 on the diagonal by forward substitution, all at once; then two neighbours at a time,
    [[A, 0], [M, B]]^-1 = [[A^-1, 0], [-B^-1 M A^-1, B^-1]], all pairs in two products of whole (C, C) tiles, which is what the
    matrix unit takes. Masks pick the blocks: no tile is cut. The product of (I + (-M)^(2^n)) would overflow where keys repeat.
    """
    C = strict.shape[0]
    leaf = min(LEAF, C)
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (C, C), n) for n in (0, 1))
    apart = i ^ j  # below 2^n if and only if both lie in one block of 2^n
    within, query, key = apart < leaf, i & (leaf - 1), j & (leaf - 1)
    leaves = jnp.where(within, strict, 0.0)

    def eliminate(n: Array, inverse: Array) -> Array:
        column = jnp.sum(jnp.where(key == n, leaves, 0.0), axis=1, keepdims=True)
        row = jnp.sum(jnp.where(query == n, inverse, 0.0), axis=0, keepdims=True)
        return inverse - jnp.where(within, column * row, 0.0)

    inverse = jax.lax.fori_loop(0, leaf - 1, eliminate, jnp.where(i == j, 1.0, 0.0))
    size = leaf
    while size < C:
        between = jnp.where((apart >= size) & (apart < 2 * size), strict, 0.0)
        inverse = inverse - dot(inverse, dot(between, inverse))
        size *= 2
    return inverse


def _strict(k: Array, f: Chunk) -> Array:
    """M (C, C)."""
    return f.write * dot(k, k, (1, 1)) * _below(f.pair)


def _below(x: Array) -> Array:
    """The part below the diagonal."""
    i, j = (jax.lax.broadcasted_iota(jnp.int32, x.shape, n) for n in (0, 1))
    return jnp.where(j < i, x, 0.0)


def solved(inverse: Array, strict: Array | None, right: Array, *, transposed: bool = False) -> Array:
    """(I + M)^-1 R, or with its transpose, all float32; refined once where M is given.

    With repeated keys and beta near 2 the entries of the inverse are near 2 in size, of both signs, and most of a product
    with it cancels: in bfloat16 nothing would be left. What float32 loses there, several times as much as substitution, the
    refinement takes back for float32 operands.
    """
    contract = (0, 0) if transposed else (1, 0)
    solution = dot(inverse, right, contract)
    if strict is None:
        return solution
    rest = right - solution - dot(strict, solution, contract)
    return solution + dot(inverse, rest, contract)


def _forward_kernel(refs: Refs, state: Any, *, scale: float, J: int, stride: int) -> None:
    start(refs, "state", state)
    k, v, f = refs["k"][...], refs["v"][...], factors(refs["gates"][...])
    entering, low = state[...], refs["k"].dtype
    strict = _strict(k, f)
    inverse = unit_inverse(strict)
    right = f.write * (v - f.into * dot(k, entering.astype(low)))
    write = solved(inverse, strict if low == jnp.float32 else None, right)
    keep(refs, entering, stride)
    if "write" in refs:
        refs["inverse"][...] = inverse
        refs["write"][...] = write
    if "o" in refs:
        q = refs["q"][...]
        scores = dot(q, k, (1, 1)) * f.pair
        o = f.into * dot(q, entering.astype(low)) + fine_dot(scores, write, low)
        refs["o"][...] = (scale * o).astype(v.dtype)
    state[...] = f.kept * entering + fine_dot(k, f.out * write, low, (0, 0))
    finish(refs, "final", state, J)


def _reverse_kernel(refs: Refs, d_state: Any, *, scale: float, J: int, stride: int, decayed: bool) -> None:
    start(refs, "d_final", d_state)
    q, k, v, do, f = refs["q"][...], refs["k"][...], refs["v"][...], refs["do"][...], factors(refs["gates"][...])
    entering, write, inverse, low = refs["entering"][...], refs["write"][...], refs["inverse"][...], refs["k"].dtype
    leaving = d_state[...]
    scores, overlap = dot(q, k, (1, 1)) * f.pair, _below(dot(k, k, (1, 1)) * f.pair)
    d_write = scale * fine_dot(scores, do, low, (0, 0)) + f.out * dot(k, leaving.astype(low))
    pull = solved(inverse, f.write * overlap if low == jnp.float32 else None, d_write, transposed=True)
    d_v = f.write * pull
    refs["dv"][...] = d_v.astype(refs["dv"].dtype)

    read_q = scale * f.into * dot(do, entering, (1, 1))
    read_k = f.into * fine_dot(pull, entering, low, (1, 1))
    left = f.out * fine_dot(write, leaving.astype(low), low, (1, 1))
    d_scores = scale * fine_dot(do, write, low, (1, 1))
    d_overlap = -fine_dot(pull, write, low, (1, 1))
    by_query, by_write = d_scores * f.pair, d_overlap * f.write * _below(f.pair)
    refs["dq"][...] = (read_q + fine_dot(by_query, k, low)).astype(refs["dq"].dtype)
    by_pairs = fine_dot(by_query, q, low, (0, 0)) + fine_dot(by_write + by_write.T, k, low)
    refs["dk"][...] = (left - f.write * read_k + by_pairs).astype(refs["dk"].dtype)
    refs["felt"][...] = jnp.zeros_like(refs["felt"])
    refs["felt"][0:1, :] = row_sums(pull * v) - row_sums(k * read_k) + row_sums(d_overlap * overlap)
    if decayed:
        # The decay of token t acts on the pairs j < t <= i, on reads from t on and on writes before t: no sum is a difference.
        into = jnp.sum(q * read_q - k * (f.write * read_k), axis=1, keepdims=True)
        out = jnp.sum(k * left, axis=1, keepdims=True)
        through = f.kept * jnp.sum(entering.astype(jnp.float32) * leaving, keepdims=True)
        i, t = (jax.lax.broadcasted_iota(jnp.int32, scores.shape, n) for n in (0, 1))
        weights = d_scores * scores + d_overlap * f.write * overlap
        from_t = dot(weights, (i < t).astype(jnp.float32)) + into
        refs["felt"][1:2, :] = jnp.sum(jnp.where(i >= t, from_t, out), axis=0, keepdims=True) + through

    by_reads = dot(q, (scale * f.into * do).astype(low), (0, 0)) - fine_dot(k, f.into * d_v, low, (0, 0))
    d_state[...] = f.kept * leaving + by_reads
    add_cotangent(refs, d_state, J - 1 - pl.program_id(2), stride)
    finish(refs, "d_initial", d_state, J)


def forward(settings: Settings, arrays: Arrays, segment_ids: Array | None) -> tuple[Array, Array | None, Array | None]:
    documents, place = given.documents(segment_ids, settings.chunk)
    at = Layout(settings, arrays)
    inputs = operands(arrays, at, gate_tiles(settings, arrays, documents, place))
    return run_forward(settings, arrays, at, _forward_kernel, inputs)


def backward(
    settings: Settings,
    arrays: Arrays,
    segment_ids: Array | None,
    do: Array,
    d_final: Array | None,
    d_states: Array | None,
) -> Arrays:
    documents, place = given.documents(segment_ids, settings.chunk)
    gates = gate_tiles(settings, arrays, documents, place)
    low = arrays.k.dtype

    at = Layout(settings, arrays)
    inputs = operands(arrays, at, gates)
    del inputs["q"]
    if arrays.state is not None:
        inputs["state"] = arrays.state, at.state()
    outputs = {"states": at.states(1, low), "inverse": at.square(), "write": at.output(at.H, at.V, jnp.float32)}
    kept = at.launch(_forward_kernel, inputs, outputs, 1)

    at = Layout(settings, arrays, reverse=True)
    # A query/key head that several value heads read has its gradient summed over them, in float32.
    key_dtype = low if at.Hk == at.H else jnp.float32
    inputs = operands(arrays, at, gates) | {
        "do": (heads_first(do), at.tokens(at.H, at.V)),
        "entering": (kept["states"], at.states(1)[1]),
        "inverse": (kept["inverse"], at.square()[1]),
        "write": (kept["write"], at.tokens(at.H, at.V)),
    }
    if d_final is not None:
        inputs["d_final"] = d_final, at.state()
    if d_states is not None:
        inputs["d_states"] = d_states, at.states(settings.state_stride or 1)[1]
    outputs = {
        "dq": at.output(at.H, at.K, key_dtype),
        "dk": at.output(at.H, at.K, key_dtype),
        "dv": at.output(at.H, at.V, arrays.v.dtype),
        "felt": at.felt(),
    }
    if arrays.state is not None:
        outputs["d_initial"] = at.whole_state()
    kernel = functools.partial(_reverse_kernel, decayed=arrays.g is not None)
    grads = at.launch(kernel, inputs, outputs, settings.state_stride or 1)

    def tokens(row: int) -> Array:
        """(B, H, T)."""
        return grads["felt"][:, :, :, row].reshape(at.B, at.H, at.T)

    return Arrays(
        q=given.by_key_head(heads_first(grads["dq"]), arrays.q),
        k=given.by_key_head(heads_first(grads["dk"]), arrays.k),
        v=heads_first(grads["dv"]),
        g=None if arrays.g is None else jnp.swapaxes(tokens(1), 1, 2),
        u=tools.write_gradient(settings, arrays, {"du": tokens(0)[None]}),
        state=grads.get("d_initial"),
    )
