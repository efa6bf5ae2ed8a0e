"""What the mixers with a memory that learns at test time share: its initial weights, its place on the mesh, its costs.

The sequence is not split over devices here: a memory that is not linear in its past has no affine prefix to carry.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from mlt_kernels import test_time_memory
from mlt_kernels.test_time_memory import MemorySpec, MemoryState, copies, empty_state, initial_state

from mlt.mixers.base import Kernel
from mlt.mixers.recurrent import Row
from mlt.nn.param import Init, ones, param, zeros
from mlt.parallel.local import CHANNELS, Q_HEADS

Shapes = tuple[tuple[int, int], ...]
GATES = ("log_decay", "log_momentum", "threshold")
PER_HEAD = ("heads", None)


class FastWeights(nnx.Module):
    """The learned initial memory of every head, and the op on it.

    Args:
        spec: what the memory is.
        heads: memories side by side.
        shapes: (a, b) of each matrix, bias rows not counted.
        inits: of each matrix; None leaves the matrix to the caller of `recall`.
        momentum: whether a memory of rule "chunk" has momentum.
        backend: implementation of the op; None takes the best available.
    """

    def __init__(
        self,
        spec: MemorySpec,
        heads: int,
        shapes: Shapes,
        inits: tuple[Init, ...] | None,
        *,
        momentum: bool = False,
        backend: Kernel = None,
    ):
        self.spec, self.heads, self.shapes = spec, heads, shapes
        self.momentum, self.backend = momentum, backend
        axes = ("heads", "head_dim", None)
        pairs = [] if inits is None else list(zip(shapes, inits, strict=True))
        self.weights = nnx.List([param((heads, a, b), axes, init) for (a, b), init in pairs])
        self.bias = nnx.List([param((heads, 1, b), axes, zeros, group="vector") for _, b in shapes] if spec.bias else [])
        width = shapes[-1][1]
        self.norm_scale = param((heads, width), axes[:2], ones, group="vector") if spec.layer_norm else None
        self.norm_bias = param((heads, width), axes[:2], zeros, group="vector") if spec.layer_norm else None

    def matrices(self) -> tuple[jax.Array, ...]:
        """The initial memory as the op takes it."""
        weights = [w[...] for w in self.weights]
        if self.spec.bias:
            weights = [jnp.concatenate([w, b[...]], axis=1) for w, b in zip(weights, self.bias, strict=True)]
        return tuple(weights)

    def recall(
        self,
        row: Row,
        q_BTHK: jax.Array,
        k_BTHK: jax.Array,
        v_BTHV: jax.Array,
        *,
        step: jax.Array,
        row_weight: jax.Array | None = None,
        matrices: tuple[jax.Array, ...] | None = None,
        **gates: jax.Array,
    ) -> jax.Array:
        """What the memory answers, (B, T, H, V); each device runs its own rows and heads.

        Args:
            row: whole, or a continuation whose state keeps the memory as `memory`.
            step: (B, T, H, L) for the L matrices.
            row_weight, gates: those of the op's gates that the memory has.
            matrices: the initial memory, where the module does not hold it.
        """
        matrices = self.matrices() if matrices is None else matrices
        norm = [None if x is None else x[...] for x in (self.norm_scale, self.norm_bias)]

        def run(state: dict[str, Any] | None, segment_ids: jax.Array, *parts: Any) -> tuple[jax.Array, dict[str, Any]]:
            q, k, v, step, row_weight, scale, bias, *rest = parts
            given: dict[str, Any] = dict(zip(GATES, rest, strict=False))
            memory = tuple(rest[len(GATES) :])
            given |= {"row_weight": row_weight, "norm_scale": scale, "norm_bias": bias, "segment_ids": segment_ids}
            given |= {"spec": self.spec, "step": step, "implementation": self.backend}
            if state is None:
                return test_time_memory(q, k, v, memory, **given), {}
            entering = self._from_the_start(state["memory"], memory)
            o, last = test_time_memory(q, k, v, memory, **given, initial_state=entering, return_final_state=True)
            return o, {"memory": last}

        arrays: Any = (q_BTHK, k_BTHK, v_BTHV, step, row_weight, *norm, *(gates.get(name) for name in GATES), *matrices)
        axes = (Q_HEADS, Q_HEADS, Q_HEADS, Q_HEADS, (None,), PER_HEAD, PER_HEAD, *(CHANNELS,) * len(GATES))
        return row.token_scan(run, ("memory",), arrays, (*axes, *(("heads", None, None),) * len(matrices)))

    def init_state(self, batch: int) -> MemoryState:
        """Zeros, and no token seen: the learned memory takes their place when the first one comes."""
        shapes = tuple((self.heads, a + self.spec.bias, b) for a, b in self.shapes)
        return empty_state(shapes, self.spec, batch, momentum=self.momentum)

    def _from_the_start(self, state: MemoryState, memory: tuple[jax.Array, ...]) -> MemoryState:
        """The state, the initial one where no token of the document has been seen."""
        started_B = state.position > 0
        fresh = initial_state(memory, self.spec, started_B.shape[0], momentum=self.momentum)
        return jax.tree.map(lambda a, b: jnp.where(started_B.reshape(-1, *[1] * (a.ndim - 1)), a, b), state, fresh)


def memory_values(shapes: Shapes, *, spec: MemorySpec, heads: int, momentum: bool = False) -> int:
    """Values of the decoding state of `heads` memories."""
    size = sum((a + spec.bias) * b for a, b in shapes)
    return heads * (size * copies(spec, momentum) + (spec.rule == "chunk" and momentum))


def memory_flops(shapes: Shapes, *, spec: MemorySpec, seq_len: int) -> float:
    """Forward FLOPs of one token and head: gradients, reads, writes by products of tokens, Newton-Schulz by the chunk."""
    size = sum(a * b for a, b in shapes)
    inputs = shapes[0][0] * shapes[0][1] * (2 if spec.net == "gated" else 1)
    chunk = min(spec.chunk_size, seq_len)
    total = 8.0 * size - 2 * inputs
    if spec.rule == "momentum":
        total += 4 * size
    if spec.read == "token":
        total += 2 * chunk * sum(a + b for a, b in shapes)
    for a, b in shapes:
        small, large = sorted((a, b))
        total += len(spec.newton_schulz) * (4 * small**2 * large + 2 * small**3) / spec.chunk_size
    return total


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def inverse_softplus(value: float) -> float:
    return value + math.log(-math.expm1(-value))


def log_forget(x: jax.Array, bias: jax.Array) -> jax.Array:
    """log(1 - sigmoid(x + bias)) in float32, exact at both ends."""
    return jax.nn.log_sigmoid(-(x.astype(jnp.float32) + bias))
