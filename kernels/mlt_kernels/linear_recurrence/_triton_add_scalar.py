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
from mlt_kernels.linear_recurrence._kernel_inputs import OF_VALUES, Arrays, decay_gradient
from mlt_kernels.linear_recurrence._triton_call import Call
from mlt_kernels.linear_recurrence._triton_tools import Settings, Sizes, measured, power_of_two, slabs_of

KERNELS, EVERY = "add_scalar_kernels:", "HK K V KEYS VALUES SCALE HAS_G HAS_U HAS_DOCS"
"""The kernels' module, and the options of every one of them."""


def sizes(kernel: str, K: int, V: int, item_bytes: int) -> Sizes:
    """The rule serves every GPU: registers and spills are in kernels/reports/triton_registers.md."""
    whole_K, whole_V = power_of_two(K), power_of_two(V)
    along, across = (whole_V, whole_K) if kernel in OF_VALUES else (whole_K, whole_V)
    interpreting = triton_calls.interpreting()
    if interpreting:
        slab, warps, stages = 16, 4, 1
    elif item_bytes == 4:
        slab, warps, stages = min(along, 32), 4 if across <= 128 else 8, 1
    elif across > 128:
        slab, warps, stages = min(along, 32), 8, 2
    elif kernel == "values" and across > 64:
        slab, warps, stages = min(along, 32), 4, 3
    else:
        slab, warps, stages = min(along, 64), 8, 3
    rule = Sizes(whole_K, slab, warps, stages) if kernel in OF_VALUES else Sizes(slab, whole_V, warps, stages)
    return rule if interpreting else measured(kernel, K, V, item_bytes, rule, vector=False)


class ScalarCall(Call):
    """The kernels of one call, with its sums of decays, made in XLA."""

    def __init__(self, settings: Settings, arrays: Arrays, segment_ids: Array | None):
        super().__init__(settings, arrays, segment_ids)
        self.sums: Any = (None, None) if arrays.g is None else given.decay_sums(arrays.g, self.place, self.C)

    def at(self, kernel: str) -> Sizes:
        return sizes(kernel, self.K, self.V, self.low.itemsize)

    def slabs(self, kernel: str) -> int:
        return slabs_of(self.at(kernel), kernel, self.K, self.V)

    def run(self, kernel: str, inputs: list[Array | None], outputs: list[jax.ShapeDtypeStruct], **more: Any) -> list[Array]:
        """Runs a kernel on q, k, v, the gates and `inputs`."""
        gates = [*self.sums, self.u, *self.borders]
        return self.launch(KERNELS + kernel, EVERY, [*self.arrays[:3], *gates, *inputs], outputs, **more)

    def partial(self, kernel: str, *, wanted: bool) -> jax.ShapeDtypeStruct:
        """(X, B, H, T): each slab's part of a sum over the dim that the slabs share."""
        return self.float32(self.slabs(kernel), self.B, self.H, self.T, wanted=wanted)


def forward(settings: Settings, arrays: Arrays, segment_ids: Array | None) -> tuple[Array, Array, Array | None]:
    call, stride = ScalarCall(settings, arrays, segment_ids), settings.stride
    outputs = [call.like(arrays.v), call.state(), call.states(stride)]
    o, final, states = call.run("forward", [arrays.state], outputs, HAS_INITIAL=arrays.state is not None, STRIDE=stride or 0)
    return o, final, states if stride else None


def backward(
    settings: Settings, arrays: Arrays, segment_ids: Array | None, do: Array, d_final: Array, d_states: Array | None
) -> Arrays:
    call, stride, decayed = ScalarCall(settings, arrays, segment_ids), settings.anchor, arrays.g is not None
    anchors_shape = call.states(stride if decayed else None)
    dq, reads, pairs, anchors = call.run(
        "queries",
        [arrays.state, do],
        [call.d_key(), *[call.partial("queries", wanted=decayed)] * 2, anchors_shape],
        HAS_INITIAL=arrays.state is not None,
        STRIDE=stride,
    )
    cotangents: dict[str, Any] = {"HAS_STATES": d_states is not None, "STRIDE": stride}
    outputs = [call.d_key(), call.partial("keys", wanted=decayed), anchors_shape]
    dk, writes, d_anchors = call.run("keys", [do, d_final, d_states], outputs, **cotangents)
    outputs = [call.like(arrays.v), call.partial("values", wanted=settings.gated), call.state()]
    dv, du, d_initial = call.run("values", [do, d_final, d_states], outputs, GATED=settings.gated, **cotangents)
    d_g = None
    if decayed:
        passed = _passed(call, stride)
        through = {"writes": writes, "through": (passed * jnp.sum(anchors * d_anchors, axis=(3, 4)).swapaxes(1, 2))[None]}
        d_g = decay_gradient({"pairs": pairs, "reads": reads}, through, call.documents, call.C, stride)
    return Arrays(
        q=given.by_key_head(dq, arrays.q),
        k=given.by_key_head(dk, arrays.k),
        v=dv,
        g=d_g,
        u=call.write_gradient(du),
        state=None if arrays.state is None else d_initial,
    )


def _passed(call: ScalarCall, stride: int) -> Array:
    """(B, H, N): what is left of the state that enters the last of every `stride` chunks when it leaves it."""
    coarse, fine = call.sums
    last = np.minimum(np.arange(stride, call.J + stride, stride), call.J) - 1
    end = last * call.C + call.C - 1
    passed = jnp.exp(coarse[..., end] + fine[..., end])
    return passed if call.documents is None else jnp.where(call.documents.first_end_BJ[:, None, last] < 0, passed, 0.0)
