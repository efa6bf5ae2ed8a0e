"""The delta rule with one decay a head and key dim (KDA), in Triton kernels.

Forward: `sums` adds up the log decays of each chunk, `kda_prepare` makes the decayed products inside the chunks and decays q and
k to the chunks' borders, `delta_invert` inverts, `kda_run` walks. Backward: the first two again, `kda_run`, `kda_reverse`,
`kda_pairs` and `kda_keys`. Between the kernels lie, beside what `_triton_delta` names, two float32 numbers a decay, three numbers
a key dim and token, two of them in two parts, and for each token and head C scores in two parts and C float32 overlaps. Letters:
see `_triton_delta_call`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mlt_kernels.linear_recurrence import _kernel_inputs as given
from mlt_kernels.linear_recurrence._kernel_inputs import Arrays
from mlt_kernels.linear_recurrence._triton_delta_call import Call

SUMS, INVERT, KERNELS = "levels:sums", "delta_solve:delta_invert", "delta_vector_kernels:"
WALK = "K V KEYS VALUES SCALE HAS_U"


class VectorCall(Call):
    def prepare(self) -> None:
        """Sums of decays; then scores, overlaps, q_into, k_into, k_out and kept."""
        outputs = [self.of_keys(jnp.float32)] * 2
        more: dict[str, Any] = {"slabs": self.J * self.slabs("sums"), "chunks": False, "GRID": given.GRID}
        self.sums = self.launch(SUMS, "K KEYS HAS_DOCS", [self.arrays.g, self.place], outputs, **more)
        self.levels: dict[str, Any] = {"LEVELS": self.C.bit_length() - 1}
        kept = self.float32(self.B, self.J, self.H, self.K)
        outputs = [self.parts(self.squares()), self.squares(), self.of_keys(), *[self.parts(self.of_keys())] * 2, kept]
        inputs = [*self.arrays[:2], *self.sums, *self.borders]
        self.prepared = self.launch(KERNELS + "kda_prepare", "HK K KEYS HAS_DOCS", inputs, outputs, slabs=self.J, **self.levels)

    def solve(self) -> Array:
        inputs = [self.prepared[1], self.u, self.borders[0]]
        return self.launch(INVERT, "HAS_U HAS_DOCS", inputs, [self.parts(self.squares(), 3)], slabs=self.J)[0]

    def run(self, inverse: Array, outputs: list[jax.ShapeDtypeStruct], *, OUTPUT: bool, STRIDE: int) -> list[Array]:
        state = self.arrays.state
        inputs = [*self.prepared, inverse, self.arrays.v, self.u, state]
        more: dict[str, Any] = {"HAS_INITIAL": state is not None, "OUTPUT": OUTPUT, "STRIDE": STRIDE}
        return self.launch(KERNELS + "kda_run", WALK, inputs, outputs, **more)

    def reverse(self, inverse: Array, do: Array, d_final: Array, d_entering: Array | None) -> list[Array]:
        inputs = [*self.prepared, inverse, self.u, do, d_final, d_entering]
        more: dict[str, Any] = {"HAS_STATES": d_entering is not None, "STRIDE": self.settings.stride or 1}
        return self.launch(KERNELS + "kda_reverse", WALK, inputs, self.reverse_outputs(), **more)

    def gradients(self, do: Array, write: Array, pull: Array, states: Array, d_states: Array) -> Arrays:
        q, k, v, *_ = self.arrays
        X, by_token, gated = self.slabs("kda_keys"), (self.B, self.H, self.T), self.settings.gated
        dv, du, d_scores, d_overlap = self.launch(
            KERNELS + "kda_pairs",
            "V VALUES SCALE HAS_U HAS_DOCS GATED",
            [self.prepared[1], v, self.u, self.borders[0], do, write, pull],
            [self.like(v), self.float32(*by_token, wanted=gated), self.squares(), self.squares()],
            slabs=self.J,
        )
        dq, dk, dg, du_reads = self.launch(
            KERNELS + "kda_keys",
            "HK K V KEYS VALUES SCALE HAS_U HAS_DOCS GATED",
            [q, k, *self.sums, self.u, *self.borders, do, write, pull, states, d_states, d_scores, d_overlap],
            [self.d_key(), self.d_key(), self.of_keys(jnp.float32), self.float32(X, *by_token, wanted=gated)],
            slabs=self.J * X,
            **self.levels,
        )
        return Arrays(given.by_key_head(dq, q), given.by_key_head(dk, k), dv, dg, self.d_u(du, du_reads), None)
