"""The add rule with no decay or one decay a head, in Mosaic kernels for a TPU.

A TPU core runs the last dim of its grid in order, here the chunks, with a whole state in fast memory. Forward: one kernel.
Backward: `reads` walks forwards, recomputes the state and gives dq; `writes` walks backwards with the state's cotangent and
gives dk and dv. As on a GPU, `reads` leaves one chunk's entering state in 16 to `writes` if decays have gradients.

Letters: B rows, T tokens, J chunks, C tokens of a chunk (i as query, j as key), H value heads, K key dim, V value dim.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl

from mlt_kernels.linear_recurrence import _kernel_inputs as given
from mlt_kernels.linear_recurrence import _pallas_tools as tools
from mlt_kernels.linear_recurrence._kernel_inputs import Arrays
from mlt_kernels.linear_recurrence._pallas_tools import Refs, Settings
from mlt_kernels.linear_recurrence._pallas_tpu_tools import (
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


def _forward_kernel(refs: Refs, state: Any, *, scale: float, J: int, stride: int) -> None:
    start(refs, "state", state)
    q, k, v, f = refs["q"][...], refs["k"][...], refs["v"][...], factors(refs["gates"][...])
    entering = state[...]
    keep(refs, entering, stride)
    scores = dot(q, k, (1, 1)) * f.pair * f.write_row
    o = dot(scores.astype(v.dtype), v) + dot(q, entering.astype(q.dtype)) * f.into
    refs["o"][...] = (scale * o).astype(v.dtype)
    state[...] = f.kept * entering + dot(k, (v * (f.write * f.out)).astype(k.dtype), (0, 0))
    finish(refs, "final", state, J)


def _reads_kernel(refs: Refs, state: Any, *, scale: float, J: int, stride: int) -> None:
    start(refs, "state", state)
    q, k, v, do, f = refs["q"][...], refs["k"][...], refs["v"][...], refs["do"][...], factors(refs["gates"][...])
    entering = state[...]
    c = pl.program_id(2)
    if "anchors" in refs:

        @pl.when((c % stride == stride - 1) | (c == J - 1))
        def _() -> None:
            refs["anchors"][...] = entering

    d_scores = scale * dot(do, v, (1, 1)) * f.pair * f.write_row
    inter = scale * dot(do, entering.astype(do.dtype), (1, 1)) * f.into
    refs["dq"][...] = (dot(d_scores.astype(k.dtype), k) + inter).astype(refs["dq"].dtype)
    state[...] = f.kept * entering + dot(k, (v * (f.write * f.out)).astype(k.dtype), (0, 0))
    if "felt" in refs:
        i, t = (jax.lax.broadcasted_iota(jnp.int32, d_scores.shape, n) for n in (0, 1))
        weight = jnp.where(i > t, d_scores * dot(q, k, (1, 1)), 0.0)
        earlier = dot(weight, (i < t).astype(jnp.float32))
        refs["felt"][...] = jnp.zeros_like(refs["felt"])
        refs["felt"][0:1, :] = jnp.sum(jnp.where(i >= t, earlier, 0.0), axis=0, keepdims=True)
        refs["felt"][1:2, :] = row_sums(q.astype(jnp.float32) * inter)


def _writes_kernel(refs: Refs, d_state: Any, *, scale: float, J: int, stride: int) -> None:
    start(refs, "d_final", d_state)
    q, k, v, do, f = refs["q"][...], refs["k"][...], refs["v"][...], refs["do"][...], factors(refs["gates"][...])
    leaving = d_state[...]
    d_scores = scale * dot(do, v, (1, 1)) * f.pair * f.write_row
    inter = dot(v, leaving.astype(v.dtype), (1, 1)) * (f.write * f.out)
    refs["dk"][...] = (dot(d_scores.astype(q.dtype), q, (0, 0)) + inter).astype(refs["dk"].dtype)
    scores = scale * dot(q, k, (1, 1)) * f.pair
    d_write = dot(scores.astype(do.dtype), do, (0, 0)) + dot(k, leaving.astype(k.dtype)) * f.out
    refs["dv"][...] = (d_write * f.write).astype(refs["dv"].dtype)
    d_state[...] = f.kept * leaving + dot(q, (do * (scale * f.into)).astype(q.dtype), (0, 0))
    add_cotangent(refs, d_state, J - 1 - pl.program_id(2), stride)
    refs["felt"][...] = jnp.zeros_like(refs["felt"])
    refs["felt"][0:1, :] = row_sums(v.astype(jnp.float32) * d_write)
    if "anchors" in refs:
        refs["felt"][1:2, :] = row_sums(k.astype(jnp.float32) * inter)
        through = f.kept * jnp.sum(refs["anchors"][...] * leaving, keepdims=True)
        refs["felt"][2:3, :] = jnp.broadcast_to(through, (1, k.shape[0]))
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
    gates, do = gate_tiles(settings, arrays, documents, place), heads_first(do)
    stride, decayed = settings.anchor, arrays.g is not None

    at = Layout(settings, arrays)
    # A query/key head that several value heads read has its gradient summed over them, in float32.
    key_dtype = arrays.q.dtype if at.Hk == at.H else jnp.float32
    inputs = operands(arrays, at, gates) | {"do": (do, at.tokens(at.H, at.V))}
    outputs = {"dq": at.output(at.H, at.K, key_dtype)}
    if arrays.state is not None:
        inputs["state"] = arrays.state, at.state()
    if decayed:
        outputs["felt"] = at.felt()
        outputs["anchors"] = at.states(stride)
    reads = at.launch(_reads_kernel, inputs, outputs, stride)

    at = Layout(settings, arrays, reverse=True)
    inputs = operands(arrays, at, gates) | {"do": (do, at.tokens(at.H, at.V))}
    outputs = {
        "dk": at.output(at.H, at.K, key_dtype),
        "dv": at.output(at.H, at.V, arrays.v.dtype),
        "felt": at.felt(),
    }
    if d_final is not None:
        inputs["d_final"] = d_final, at.state()
    if d_states is not None:
        inputs["d_states"] = d_states, at.states(stride)[1]
    if decayed:
        inputs["anchors"] = reads["anchors"], at.states(stride)[1]
    if arrays.state is not None:
        outputs["d_initial"] = at.whole_state()
    writes = at.launch(_writes_kernel, inputs, outputs, stride)

    def tokens(felt: Array, row: int) -> Array:
        """(1, B, H, T), as the GPU's kernels give it: one slab's part."""
        return felt[:, :, :, row].reshape(1, at.B, at.H, at.T)

    dg = None
    if decayed:
        of_reads = {"pairs": tokens(reads["felt"], 0), "reads": tokens(reads["felt"], 1)}
        last = np.minimum(stride * np.arange(1, -(-at.J // stride) + 1), at.J) - 1
        of_writes = {"writes": tokens(writes["felt"], 1), "through": writes["felt"][None, :, :, last, 2, 0]}
        dg = given.decay_gradient(of_reads, of_writes, documents, settings.chunk, stride)
    return Arrays(
        q=given.by_key_head(heads_first(reads["dq"]), arrays.q),
        k=given.by_key_head(heads_first(writes["dk"]), arrays.k),
        v=heads_first(writes["dv"]),
        g=dg,
        u=tools.write_gradient(settings, arrays, {"du": tokens(writes["felt"], 0)}),
        state=writes.get("d_initial"),
    )
