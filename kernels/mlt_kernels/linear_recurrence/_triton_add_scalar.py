"""The add rule with no decay or one decay a head, in Triton kernels.

Forward: one kernel, with a slab of V of the state in registers; only o leaves (and the states that the caller asks for).
Backward: three kernels, each of which recomputes its own state. `queries` walks forwards and gives dq; `keys` and `values`
walk backwards and give dk and dv. The forward saves no state. Only where decays have gradients do `queries` and `keys` leave
the state that enters one chunk in 16 and the cotangent of the one that leaves it (float32): their product is what the decays of
that chunk feel of the state that passes it, and what a decay feels between two such anchors is then a difference of few and near
terms (see `_kernel_inputs.decay_gradient`).

Letters: B rows, T tokens, J chunks, H value heads, X slabs, K key dim, V value dim.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mlt_kernels import triton_calls
from mlt_kernels.linear_recurrence import _kernel_inputs as given
from mlt_kernels.linear_recurrence._kernel_inputs import Arrays, decay_gradient
from mlt_kernels.linear_recurrence._triton_tools import OF_VALUES, Settings, Sizes, power_of_two, slabs_of

KERNELS = "linear_recurrence._triton_kernels"


def sizes(kernel: str, K: int, V: int, item_bytes: int) -> Sizes:
    """One choice for every GPU until one is measured: registers and spills are in kernels/reports/triton_registers.md."""
    whole_K, whole_V = power_of_two(K), power_of_two(V)
    along, across = (whole_V, whole_K) if kernel in OF_VALUES else (whole_K, whole_V)
    if triton_calls.interpreting():
        slab, warps, stages = 16, 4, 1
    elif item_bytes == 4:
        slab, warps, stages = min(along, 32), 4 if across <= 128 else 8, 1
    elif across > 128:
        slab, warps, stages = min(along, 32), 8, 2
    elif kernel == "values" and across > 64:
        slab, warps, stages = min(along, 32), 4, 3
    else:
        slab, warps, stages = min(along, 64), 8, 3
    return Sizes(whole_K, slab, warps, stages) if kernel in OF_VALUES else Sizes(slab, whole_V, warps, stages)


def forward(settings: Settings, arrays: Arrays, segment_ids: Array | None) -> tuple[Array, Array, Array | None]:
    B, T, H, V = arrays.v.shape
    K, stride = arrays.q.shape[-1], settings.stride
    number = -(-(T // settings.chunk) // stride) if stride else 0
    state = jax.ShapeDtypeStruct((B, H, K, V), jnp.float32)
    states = jax.ShapeDtypeStruct((B, number, H, K, V) if stride else (1,), jnp.float32)
    o, final, states = _call(
        "forward",
        settings,
        arrays,
        segment_ids,
        [arrays.state],
        [jax.ShapeDtypeStruct(arrays.v.shape, arrays.v.dtype), state, states],
        HAS_INITIAL=arrays.state is not None,
        STRIDE=stride or 0,
    )
    return o, final, states if stride else None


def backward(
    settings: Settings, arrays: Arrays, segment_ids: Array | None, do: Array, d_final: Array, d_states: Array | None
) -> Arrays:
    (B, T, H, V), (Hk, K) = arrays.v.shape, arrays.q.shape[2:]
    stride, decayed, float32 = settings.anchor, arrays.g is not None, jnp.float32
    number = -(-(T // settings.chunk) // stride)
    # A query/key head that several value heads read has its gradient summed over them, in float32.
    d_key = jax.ShapeDtypeStruct((B, T, H, K), arrays.q.dtype if Hk == H else float32)

    def partial(kernel: str, length: int, wanted: bool) -> jax.ShapeDtypeStruct:
        slabs = slabs_of(sizes(kernel, K, V, arrays.q.dtype.itemsize), kernel, K, V)
        return jax.ShapeDtypeStruct((slabs, B, H, length) if wanted else (1,), float32)

    states = jax.ShapeDtypeStruct((B, number, H, K, V) if decayed else (1,), float32)
    dq, reads, pairs, anchors = _call(
        "queries",
        settings,
        arrays,
        segment_ids,
        [arrays.state, do],
        [d_key, partial("queries", T, decayed), partial("queries", T, decayed), states],
        HAS_INITIAL=arrays.state is not None,
        STRIDE=stride,
    )
    cotangents = {"HAS_FINAL": True, "HAS_STATES": d_states is not None, "STRIDE": stride}
    dk, writes, d_anchors = _call(
        "keys",
        settings,
        arrays,
        segment_ids,
        [do, d_final, d_states],
        [d_key, partial("keys", T, decayed), states],
        **cotangents,
    )
    dv, du, d_initial = _call(
        "values",
        settings,
        arrays,
        segment_ids,
        [do, d_final, d_states],
        [
            jax.ShapeDtypeStruct(arrays.v.shape, arrays.v.dtype),
            partial("values", T, settings.gated),
            jax.ShapeDtypeStruct((B, H, K, V), float32),
        ],
        GATED=settings.gated,
        **cotangents,
    )
    d_g = None
    if arrays.g is not None:
        documents, place = given.documents(segment_ids, settings.chunk)
        passed = _passed(given.decay_sums(arrays.g, place, settings.chunk), documents, settings.chunk, stride)
        through = {"writes": writes, "through": (passed * jnp.sum(anchors * d_anchors, axis=(3, 4)).swapaxes(1, 2))[None]}
        d_g = decay_gradient({"pairs": pairs, "reads": reads}, through, documents, settings.chunk, stride)
    d_u = None if arrays.u is None else jnp.zeros_like(arrays.u)
    return Arrays(
        q=given.by_key_head(dq, arrays.q),
        k=given.by_key_head(dk, arrays.k),
        v=dv,
        g=d_g,
        u=jnp.swapaxes(jnp.sum(du, axis=0), 1, 2) if settings.gated else d_u,
        state=None if arrays.state is None else d_initial,
    )


def _passed(sums: tuple[Array, Array], documents: given.Documents | None, C: int, stride: int) -> Array:
    """(B, H, N): what is left of the state that enters the last of every `stride` chunks when it leaves it."""
    J = sums[0].shape[2] // C
    last = np.minimum(np.arange(stride, J + stride, stride), J) - 1
    passed = jnp.exp(sums[0][..., last * C + C - 1] + sums[1][..., last * C + C - 1])
    return passed if documents is None else jnp.where(documents.first_end_BJ[:, None, last] < 0, passed, 0.0)


def _call(
    kernel: str,
    settings: Settings,
    arrays: Arrays,
    segment_ids: Array | None,
    inputs: list[Array | None],
    outputs: list[jax.ShapeDtypeStruct],
    **options: Any,
) -> list[Array]:
    (B, T, H, V), (HK, K) = arrays.v.shape, arrays.q.shape[2:]
    at = sizes(kernel, K, V, arrays.q.dtype.itemsize)
    documents, place = given.documents(segment_ids, settings.chunk)
    sums = (None, None) if arrays.g is None else given.decay_sums(arrays.g, place, settings.chunk)
    u = None if arrays.u is None else jnp.swapaxes(arrays.u, 1, 2)
    gates = [*sums, u, *((None, None) if documents is None else documents)]
    nothing = triton_calls.nothing()
    return triton_calls.call(
        f"{KERNELS}:{kernel}",
        [*arrays[:3], *(nothing if x is None else x for x in (*gates, *inputs)), T, T // settings.chunk],
        outputs,
        grid=(slabs_of(at, kernel, K, V), H, B),
        warps=at.warps,
        stages=at.stages,
        H=H,
        HK=HK,
        K=K,
        V=V,
        C=settings.chunk,
        KEYS=at.keys,
        VALUES=at.values,
        SCALE=settings.scale,
        HAS_G=arrays.g is not None,
        HAS_U=arrays.u is not None,
        HAS_DOCS=documents is not None,
        **options,
    )
