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
from mlt_kernels.linear_recurrence._kernel_inputs import OF_VALUES, Arrays
from mlt_kernels.linear_recurrence._triton_call import Call
from mlt_kernels.linear_recurrence._triton_tools import Settings, Sizes, measured, power_of_two, slabs_of

SUMS, KERNELS = "levels:sums", "add_vector_kernels:"
TOKEN_PARALLEL = ("sums", "prepare", "inner")
"""Kernels whose programs take one chunk."""


def sizes(kernel: str, K: int, V: int, item_bytes: int) -> Sizes:
    """The rule serves every GPU: registers and spills are in kernels/reports/triton_registers.md."""
    whole_K, whole_V = power_of_two(K), power_of_two(V)
    along, across = (whole_V, whole_K) if kernel in OF_VALUES else (whole_K, whole_V)
    interpreting = triton_calls.interpreting()
    if interpreting:
        slab, warps, stages = 16, 4, 1
    elif kernel in TOKEN_PARALLEL:
        slab, warps, stages = min(whole_K, 32 if kernel == "inner" else 64), 8, 1
    elif item_bytes == 4:
        slab, warps, stages = min(along, 32), 4 if across <= 128 else 8, 1
    elif across <= 128:
        slab, warps, stages = min(along, 64), 8, 2
    else:  # Products need 64 keys or tokens of one tile for `wgmma`, and `keys` has the most in registers.
        slab, warps, stages = min(along, 32 if kernel in OF_VALUES else 64), 8, 1 if kernel == "keys" else 2
    rule = Sizes(whole_K, slab, warps, stages) if kernel in OF_VALUES else Sizes(slab, whole_V, warps, stages)
    return rule if interpreting else measured(kernel, K, V, item_bytes, rule, vector=True)


class Prepared(NamedTuple):
    """What the walks read of q, k and the decays."""

    q_into: Array  # (B, T, H, K): q decayed from the chunk's start, 0 in documents that start later
    k_out: Array  # (B, T, H, K): k decayed to the chunk's end, 0 in documents that end earlier
    kept: Array  # (B, J, H, K) float32: what is left of the state that entered a chunk


class VectorCall(Call):
    """The kernels of one call, with its sums of decays."""

    def __init__(self, settings: Settings, arrays: Arrays, segment_ids: Array | None):
        super().__init__(settings, arrays, segment_ids)
        more: dict[str, Any] = {"slabs": self.J * self.slabs("sums"), "chunks": False, "GRID": given.GRID}
        self.sums = self.launch(SUMS, "K KEYS HAS_DOCS", [arrays.g, self.place], [self.of_keys(jnp.float32)] * 2, **more)

    def at(self, kernel: str) -> Sizes:
        return sizes(kernel, self.K, self.V, self.low.itemsize)

    def slabs(self, kernel: str) -> int:
        return slabs_of(self.at(kernel), kernel, self.K, self.V)

    def prepare(self) -> tuple[Array, Prepared]:
        """Scores (B, H, J, C, C), 0 where tokens do not meet, and the rest."""
        inputs = [*self.arrays[:2], *self.sums, *self.borders]
        outputs = [self.squares(self.low), self.of_keys(), self.of_keys(), self.of_keys_a_chunk()]
        options = "HK K KEYS HAS_DOCS"
        scores, *rest = self.launch(KERNELS + "prepare", options, inputs, outputs, slabs=self.J, **self.levels)
        return scores, Prepared(*rest)

    def walk(self, kernel: str, inputs: list[Any], outputs: list[jax.ShapeDtypeStruct], **more: Any) -> list[Array]:
        """Runs a kernel that walks over the chunks."""
        return self.launch(KERNELS + kernel, "K V KEYS VALUES SCALE HAS_U", inputs, outputs, **more)

    def of_keys_a_chunk(self) -> jax.ShapeDtypeStruct:
        """(B, J, H, K) float32."""
        return self.float32(self.B, self.J, self.H, self.K)


def forward(settings: Settings, arrays: Arrays, segment_ids: Array | None) -> tuple[Array, Array, Array | None]:
    call, stride = VectorCall(settings, arrays, segment_ids), settings.stride
    scores, prepared = call.prepare()
    o, final, states = call.walk(
        "forward",
        [scores, *prepared, arrays.v, call.u, arrays.state],
        [call.like(arrays.v), call.state(), call.states(stride)],
        HAS_INITIAL=arrays.state is not None,
        STRIDE=stride or 0,
    )
    return o, final, states if stride else None


def backward(
    settings: Settings, arrays: Arrays, segment_ids: Array | None, do: Array, d_final: Array, d_states: Array | None
) -> Arrays:
    call, stride = VectorCall(settings, arrays, segment_ids), settings.anchor
    scores, prepared = call.prepare()
    written = [*prepared, arrays.v, call.u, do]
    dq_into, reads, anchors = call.walk(
        "queries",
        [*written, arrays.state],
        [call.of_keys(), call.of_keys_a_chunk(), call.states(stride)],
        HAS_INITIAL=arrays.state is not None,
        STRIDE=stride,
    )
    cotangents: dict[str, Any] = {"HAS_STATES": d_states is not None, "STRIDE": stride}
    outputs = [call.of_keys(), call.of_keys_a_chunk(), call.float32(*anchors.shape[:4])]
    dk_out, writes, met = call.walk("keys", [*written, anchors, d_final, d_states], outputs, **cotangents)
    felt = call.float32(call.slabs("values"), call.B, call.H, call.T, wanted=settings.gated)
    outputs = [call.like(arrays.v), felt, call.state()]
    inputs = [scores, *written, d_final, d_states]
    dv, du, d_initial = call.walk("values", inputs, outputs, GATED=settings.gated, **cotangents)
    through = _through(reads, writes, met, prepared.kept, call.documents, stride)
    dq, dk, dg = call.launch(
        KERNELS + "inner",
        "HK K V KEYS VALUES SCALE HAS_U HAS_DOCS",
        [*arrays[:3], *call.sums, call.u, *call.borders, do, dq_into, dk_out, through],
        [call.d_key(), call.d_key(), call.of_keys(jnp.float32)],
        slabs=call.J * call.slabs("inner"),
        **call.levels,
    )
    return Arrays(
        q=given.by_key_head(dq, arrays.q),
        k=given.by_key_head(dk, arrays.k),
        v=dv,
        g=dg,
        u=call.write_gradient(du),
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
