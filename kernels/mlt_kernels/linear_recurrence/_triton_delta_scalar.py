"""The delta rule with no decay or one decay a head (DeltaNet, gated delta), in Triton kernels.

`delta_solve` and `delta_run` forward; `delta_run` again, `delta_reverse`, `delta_pairs` and `delta_keys` backward. Letters: see
`_triton_delta_call`.
"""

from typing import Any

import jax
from jax import Array

from mlt_kernels.linear_recurrence import _kernel_inputs as given
from mlt_kernels.linear_recurrence._kernel_inputs import Arrays
from mlt_kernels.linear_recurrence._triton_delta_call import Call

SOLVE, KERNELS = "delta_solve:delta_solve", "delta_scalar_kernels:"
EVERY = "HK K V KEYS VALUES SCALE HAS_G HAS_U HAS_DOCS"


class ScalarCall(Call):
    def prepare(self) -> None:
        """Sums of decays, in XLA."""
        g = self.arrays.g
        self.sums = (None, None) if g is None else given.decay_sums(g, self.place, self.C)
        self.gates = [*self.sums, self.u, *self.borders]

    def solve(self) -> Array:
        inputs = [self.arrays.k, *self.sums, self.u, self.borders[0]]
        return self.launch(SOLVE, "HK K KEYS HAS_G HAS_U HAS_DOCS", inputs, [self.parts(self.squares(), 3)], slabs=self.J)[0]

    def run(self, inverse: Array, outputs: list[jax.ShapeDtypeStruct], *, OUTPUT: bool, STRIDE: int) -> list[Array]:
        state = self.arrays.state
        inputs = [*self.arrays[:3], *self.gates, inverse, state]
        more: dict[str, Any] = {"HAS_INITIAL": state is not None, "OUTPUT": OUTPUT, "STRIDE": STRIDE}
        return self.launch(KERNELS + "delta_run", EVERY, inputs, outputs, **more)

    def reverse(self, inverse: Array, do: Array, d_final: Array, d_entering: Array | None) -> list[Array]:
        inputs = [*self.arrays[:2], *self.gates, inverse, do, d_final, d_entering]
        more: dict[str, Any] = {"HAS_STATES": d_entering is not None, "STRIDE": self.settings.stride or 1}
        return self.launch(KERNELS + "delta_reverse", EVERY, inputs, self.reverse_outputs(), **more)

    def gradients(self, do: Array, write: Array, pull: Array, states: Array, d_states: Array) -> Arrays:
        q, k, v, g, *_ = self.arrays
        X, by_token, gated = self.slabs("delta_keys"), (self.B, self.H, self.T), self.settings.gated
        outputs: list[Any] = [self.float32(*by_token, wanted=wanted) for wanted in (gated, g is not None)]
        outputs = [self.like(v), *outputs, self.squares(), self.squares()]
        inputs = [q, k, v, *self.gates, do, write, pull]
        dv, du, pairs, d_scores, d_overlap = self.launch(KERNELS + "delta_pairs", EVERY + " GATED", inputs, outputs, slabs=self.J)
        outputs = [self.float32(X, *by_token, wanted=wanted) for wanted in (gated, g is not None, g is not None)]
        outputs = [self.d_key(), self.d_key(), *outputs, self.float32(X, self.B, self.H, self.J, wanted=g is not None)]
        inputs = [q, k, *self.gates, do, write, pull, states, d_states, d_scores, d_overlap]
        dq, dk, du_reads, reads, writes, through = self.launch(
            KERNELS + "delta_keys", EVERY + " GATED", inputs, outputs, slabs=self.J * X
        )
        d_g = None
        if g is not None:
            of_keys = {"writes": writes, "through": through}
            d_g = given.decay_gradient({"pairs": pairs[None], "reads": reads}, of_keys, self.documents, self.C, 1)
        return Arrays(given.by_key_head(dq, q), given.by_key_head(dk, k), dv, d_g, self.d_u(du, du_reads), None)
