"""The add rule with one decay a head and key dim (GLA), in Triton kernels.

Forward: `sums` adds up the log decays of each chunk, `prepare` makes the decayed scores inside the chunks and decays q and k to
the chunks' borders, all chunks at once; `forward` walks over the chunks with a slab of V of the state in registers.
Backward: the first two again; `queries` walks forwards, `keys` and `values` backwards, each with its own state in registers as
in `_triton_add_scalar`; then `inner`, all chunks at once, puts dq, dk and dg together. The forward saves no state. `queries`
leaves one chunk's entering state in 16 to `keys`, and both leave each chunk's reads and writes, vectors of K: from these follows
what decays feel of the states that pass whole chunks.

Between the kernels lie two float32 numbers a decay and, in the dtype of q, four numbers a key dim (two forward) and C scores a
token and head; nothing of the size of the states. Pairs inside a chunk: `_triton_levels`.

Letters: B rows, T tokens, J chunks, C tokens of a chunk, N groups of chunks, H value heads, X slabs, K key dim, V value dim.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mlt_kernels import triton_calls
from mlt_kernels.linear_recurrence import _kernel_inputs as given
from mlt_kernels.linear_recurrence._kernel_inputs import Arrays
from mlt_kernels.linear_recurrence._triton_tools import OF_VALUES, Settings, Sizes, power_of_two, slabs_of

KERNELS = "linear_recurrence._triton_vector_kernels"
TOKEN_PARALLEL = ("sums", "prepare", "inner")
"""Kernels whose programs take one chunk."""


def sizes(kernel: str, K: int, V: int, item_bytes: int) -> Sizes:
    """One choice for every GPU until one is measured: registers and spills are in kernels/reports/triton_registers.md."""
    whole_K, whole_V = power_of_two(K), power_of_two(V)
    along, across = (whole_V, whole_K) if kernel in OF_VALUES else (whole_K, whole_V)
    if triton_calls.interpreting():
        slab, warps, stages = 16, 4, 1
    elif kernel in TOKEN_PARALLEL:
        slab, warps, stages = min(whole_K, 32 if kernel == "inner" else 64), 8, 1
    elif item_bytes == 4:
        slab, warps, stages = min(along, 32), 4 if across <= 128 else 8, 1
    elif across <= 128:
        slab, warps, stages = min(along, 64), 8, 2
    else:  # Products need 64 keys or tokens of one tile for `wgmma`, and `keys` has the most in registers.
        slab, warps, stages = min(along, 32 if kernel in OF_VALUES else 64), 8, 1 if kernel == "keys" else 2
    return Sizes(whole_K, slab, warps, stages) if kernel in OF_VALUES else Sizes(slab, whole_V, warps, stages)


class Prepared(NamedTuple):
    """What the walks read of q, k and the decays."""

    q_into: Array  # (B, T, H, K): q decayed from the chunk's start, 0 in documents that start later
    k_out: Array  # (B, T, H, K): k decayed to the chunk's end, 0 in documents that end earlier
    kept: Array  # (B, J, H, K) float32: what is left of the state that entered a chunk


class Call:
    """The kernels of one call with what they have in common."""

    def __init__(self, settings: Settings, arrays: Arrays, segment_ids: Array | None):
        self.settings, self.arrays, self.chunk = settings, arrays, settings.chunk
        (self.B, self.T, self.H, self.V), self.K = arrays.v.shape, arrays.q.shape[3]
        self.chunks, self.low = self.T // self.chunk, arrays.q.dtype
        self.documents, place = given.documents(segment_ids, self.chunk)
        self.borders = (None, None) if self.documents is None else self.documents
        self.u = None if arrays.u is None else jnp.swapaxes(arrays.u, 1, 2)
        g_BTHK = jax.ShapeDtypeStruct((self.B, self.T, self.H, self.K), jnp.float32)
        self.sums = self.run("sums", [arrays.g, place, self.T], [g_BTHK, g_BTHK], GRID=given.GRID)

    def prepare(self) -> tuple[Array, Prepared]:
        """Scores (B, H, T, C), 0 where tokens do not meet, and the rest."""
        by_key = self.of_keys(self.low)
        scores = jax.ShapeDtypeStruct((self.B, self.H, self.T, self.chunk), self.low)
        inputs = [*self.arrays[:2], *self.sums, *self.borders, self.T, self.chunks]
        scores, *rest = self.run("prepare", inputs, [scores, by_key, by_key, self.of_keys_a_chunk()])
        return scores, Prepared(*rest)

    def of_keys(self, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.B, self.T, self.H, self.K), dtype)

    def of_keys_a_chunk(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.B, self.chunks, self.H, self.K), jnp.float32)

    def state(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.B, self.H, self.K, self.V), jnp.float32)

    def states(self, stride: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.B, -(-self.chunks // stride), self.H, self.K, self.V), jnp.float32)

    def run(self, kernel: str, inputs: list[Any], outputs: list[jax.ShapeDtypeStruct], **options: Any) -> list[Array]:
        """Runs a kernel with those of its options that follow from the call."""
        at = sizes(kernel, self.K, self.V, self.low.itemsize)
        slabs = slabs_of(at, kernel, self.K, self.V)
        if kernel in TOKEN_PARALLEL:
            slabs = self.chunks * (1 if kernel == "prepare" else slabs)
            options |= {"HAS_DOCS": self.documents is not None}
        if kernel in ("prepare", "inner"):
            options |= {"HK": self.arrays.q.shape[2], "LEVELS": self.chunk.bit_length() - 1}
        if kernel not in ("sums", "prepare"):
            options |= {"V": self.V, "VALUES": at.values, "SCALE": self.settings.scale, "HAS_U": self.u is not None}
        return triton_calls.call(
            f"{KERNELS}:{kernel}",
            [triton_calls.nothing() if x is None else x for x in inputs],
            outputs,
            grid=(slabs, self.H, self.B),
            warps=at.warps,
            stages=at.stages,
            H=self.H,
            K=self.K,
            C=self.chunk,
            KEYS=at.keys,
            **options,
        )


def forward(settings: Settings, arrays: Arrays, segment_ids: Array | None) -> tuple[Array, Array, Array | None]:
    call, stride = Call(settings, arrays, segment_ids), settings.stride
    scores, prepared = call.prepare()
    o, final, states = call.run(
        "forward",
        [scores, *prepared, arrays.v, call.u, arrays.state, call.T, call.chunks],
        [
            jax.ShapeDtypeStruct(arrays.v.shape, arrays.v.dtype),
            call.state(),
            call.states(stride) if stride else jax.ShapeDtypeStruct((1,), jnp.float32),
        ],
        HAS_INITIAL=arrays.state is not None,
        STRIDE=stride or 0,
    )
    return o, final, states if stride else None


def backward(
    settings: Settings, arrays: Arrays, segment_ids: Array | None, do: Array, d_final: Array, d_states: Array | None
) -> Arrays:
    call, stride = Call(settings, arrays, segment_ids), settings.anchor
    B, T, H, J = call.B, call.T, call.H, call.chunks
    scores, prepared = call.prepare()
    written = [*prepared, arrays.v, call.u, do]
    dq_into, reads, anchors = call.run(
        "queries",
        [*written, arrays.state, T, J],
        [call.of_keys(call.low), call.of_keys_a_chunk(), call.states(stride)],
        HAS_INITIAL=arrays.state is not None,
        STRIDE=stride,
    )
    cotangents = {"HAS_STATES": d_states is not None, "STRIDE": stride}
    dk_out, writes, met = call.run(
        "keys",
        [*written, anchors, d_final, d_states, T, J],
        [call.of_keys(call.low), call.of_keys_a_chunk(), jax.ShapeDtypeStruct(anchors.shape[:4], jnp.float32)],
        **cotangents,
    )
    value_slabs = slabs_of(sizes("values", call.K, call.V, call.low.itemsize), "values", call.K, call.V)
    dv, du, d_initial = call.run(
        "values",
        [scores, *written, d_final, d_states, T, J],
        [
            jax.ShapeDtypeStruct(arrays.v.shape, arrays.v.dtype),
            jax.ShapeDtypeStruct((value_slabs, B, H, T) if settings.gated else (1,), jnp.float32),
            call.state(),
        ],
        GATED=settings.gated,
        **cotangents,
    )
    through = _through(reads, writes, met, prepared.kept, call.documents, stride)
    # A query/key head that several value heads read has its gradient summed over them, in float32.
    d_key = call.of_keys(call.low if arrays.q.shape[2] == H else jnp.float32)
    dq, dk, dg = call.run(
        "inner",
        [*arrays[:3], *call.sums, call.u, *call.borders, do, dq_into, dk_out, through, T, J],
        [d_key, d_key, call.of_keys(jnp.float32)],
    )
    d_u = None if arrays.u is None else jnp.zeros_like(arrays.u)
    return Arrays(
        q=given.by_key_head(dq, arrays.q),
        k=given.by_key_head(dk, arrays.k),
        v=dv,
        g=dg,
        u=jnp.swapaxes(jnp.sum(du, axis=0), 1, 2) if settings.gated else d_u,
        state=None if arrays.state is None else d_initial,
    )


def _through(reads: Array, writes: Array, met: Array, kept: Array, documents: given.Documents | None, stride: int) -> Array:
    """(B, J, H, K): what decays feel of states that pass their whole chunk."""
    B, J, H, K = reads.shape
    last = np.minimum(np.arange(stride, J + stride, stride), J) - 1
    whole = None if documents is None else (documents.first_end_BJ < 0)[:, None, :]

    def by_row(x: Array) -> Array:
        return jnp.swapaxes(x.reshape(B, -1, H * K), 1, 2)

    through = given.through(by_row(reads), by_row(writes), by_row(kept[:, last] * met), whole, stride)
    return jnp.swapaxes(through, 1, 2).reshape(B, J, H, K)
