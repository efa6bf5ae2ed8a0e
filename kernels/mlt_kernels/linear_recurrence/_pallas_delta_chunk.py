"""What the delta-rule GPU kernels share: launch choices, blocks of arrays, products, decays of one chunk.

Letters: B rows, H value heads, Hk query/key heads, R = H / Hk, J chunks, C tokens of a chunk (i as query, j as key), K key
dim, V value dim. A *sweep* program owns one row, head and slice of V and goes through the chunks; a *tile* program owns one
chunk. Both read an array through the same block, all tokens for the one and C tokens for the other.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from mlt_kernels import pallas
from mlt_kernels.linear_recurrence._pallas_delta_parts import fine_dot

HIGHEST = jax.lax.Precision.HIGHEST
LOWEST = -128.0
"""Log decays are clamped here; from -104 on, exp is 0 in float32. Sums of 64 of them stay exact, see `sums`."""
COARSE, FINE = 2.0**8, 2.0**26
LEAF = 16

INVERSE = ("inverse", "inverse_1", "inverse_2")
"""Parts of the stored inverses, its decays included, that add up to them: three of bfloat16 or one of float32. Where keys repeat
each chunk loses the same digits of its inverse, and over many chunks two parts would not do."""

Refs = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static facts of one call: sizes, kind of decay (none, scalar, vector) and launch choices."""

    B: int
    T: int
    H: int
    Hk: int
    K: int
    V: int
    decay: str
    scale: float
    low: Any  # dtype of matrix operands and of stored states; what cancels is float32
    interpret: bool
    states: bool  # the states that enter the chunks are a result too
    C: int
    value_block: int  # columns of V in a sweep program
    sweep_warps: int
    tile_warps: int
    solve_warps: int
    sweep_stages: int
    tile_stages: int

    @property
    def R(self) -> int:
        return self.H // self.Hk

    @property
    def J(self) -> int:
        return self.T // self.C

    @property
    def refine(self) -> bool:
        """Float32 operands: one step of refinement after each product with a stored inverse."""
        return self.low == jnp.float32

    def sweep(self, kernel: Callable[..., None], inputs: dict[str, Array], outputs: dict[str, tuple[Any, str]]) -> Any:
        """Runs `kernel` once for each row, value head and slice of V. Outputs are name -> (dtype, kind of block)."""
        kinds = self._kinds(inputs, outputs)
        specs = {name: self._sweep_spec(kind) for name, kind in kinds.items()}
        grid = (self.B * self.H, self.V // self.value_block)
        return self._call(kernel, grid, self.sweep_warps, self.sweep_stages, inputs, outputs, specs)

    def tile(
        self,
        kernel: Callable[..., None],
        inputs: dict[str, Array],
        outputs: dict[str, tuple[Any, str]],
        *,
        heads: int,
        warps: int,
        parts: int = 1,
    ) -> Any:
        """Runs `kernel` for each row, head, chunk and part of the chunk; `heads` is H, or Hk with all R value heads in one."""
        kinds = self._kinds(inputs, outputs)
        specs = {name: self._tile_spec(kind, heads) for name, kind in kinds.items()}
        return self._call(kernel, (self.B * heads, self.J, parts), warps, self.tile_stages, inputs, outputs, specs)

    def _kinds(self, inputs: dict[str, Array], outputs: dict[str, tuple[Any, str]]) -> dict[str, str]:
        decays = "vector" if self.decay == "vector" else "gate"
        known = _KINDS | {"coarse": decays, "fine": decays}
        return {name: known[name] for name in inputs} | {name: kind for name, (_, kind) in outputs.items()}

    def _call(self, kernel: Any, grid: Any, warps: int, stages: int, inputs: Any, outputs: Any, specs: dict[str, Any]) -> Any:
        shapes = {name: jax.ShapeDtypeStruct(self.shape(kind), dtype) for name, (dtype, kind) in outputs.items()}
        return pl.pallas_call(
            kernel,
            grid=grid,
            in_specs=({name: specs[name] for name in inputs},),
            out_specs={name: specs[name] for name in outputs},
            out_shape=shapes,
            interpret=self.interpret,
            compiler_params=None if self.interpret else pallas.triton_params(num_warps=warps, num_stages=stages),
        )(inputs)

    def shape(self, kind: str) -> tuple[int, ...]:
        """Shape of the arrays of one kind."""
        B, T, H, Hk, K, V, J, C = self.B, self.T, self.H, self.Hk, self.K, self.V, self.J, self.C
        shapes = {
            "key": (B, T, Hk, K),
            "value": (B, T, H, V),
            "gate": (B, H, T),
            "vector": (B, T, H, K),
            "first": (B, T),
            "leave": (B, J),
            "square": (B, H, J, C, C),
            "state": (B, H, K, V),
            "states": (B, H, J, K, V),
        }
        return shapes[kind]

    def _sweep_spec(self, kind: str) -> pl.BlockSpec:
        T, H, K, J, C, R, BV = self.T, self.H, self.K, self.J, self.C, self.R, self.value_block
        blocks = {
            "key": ((None, T, None, K), lambda y, c: (y // H, 0, y % H // R, 0)),
            "value": ((None, T, None, BV), lambda y, c: (y // H, 0, y % H, c)),
            "gate": ((None, None, T), lambda y, c: (y // H, y % H, 0)),
            "vector": ((None, T, None, K), lambda y, c: (y // H, 0, y % H, 0)),
            "first": ((None, T), lambda y, c: (y // H, 0)),
            "leave": ((None, J), lambda y, c: (y // H, 0)),
            "square": ((None, None, J, C, C), lambda y, c: (y // H, y % H, 0, 0, 0)),
            "state": ((None, None, K, BV), lambda y, c: (y // H, y % H, 0, c)),
            "states": ((None, None, J, K, BV), lambda y, c: (y // H, y % H, 0, 0, c)),
        }
        return pl.BlockSpec(*blocks[kind])

    def _tile_spec(self, kind: str, heads: int) -> pl.BlockSpec:
        N, Hk, K, V, J, C = heads, self.Hk, self.K, self.V, self.J, self.C
        R = self.H // N
        blocks = {
            "key": ((None, C, None, K), lambda y, n, _: (y // N, n, y % N * Hk // N, 0)),
            "value": ((None, C, R, V), lambda y, n, _: (y // N, n, y % N, 0)),
            "gate": ((None, R, C), lambda y, n, _: (y // N, y % N, n)),
            "vector": ((None, C, R, K), lambda y, n, _: (y // N, n, y % N, 0)),
            "first": ((None, C), lambda y, n, _: (y // N, n)),
            "leave": ((None, J), lambda y, n, _: (y // N, 0)),
            "square": ((None, R, None, C, C), lambda y, n, _: (y // N, y % N, n, 0, 0)),
            "states": ((None, R, None, K, V), lambda y, n, _: (y // N, y % N, n, 0, 0)),
        }
        return pl.BlockSpec(*blocks[kind])


_KINDS = {
    **dict.fromkeys(("q", "k"), "key"),
    **dict.fromkeys(("v", "d_o", "write", "pull"), "value"),
    **dict.fromkeys(("state", "d_last"), "state"),
    **dict.fromkeys(("states", "d_states", "d_entering"), "states"),
    **dict.fromkeys((*INVERSE, "scores", "overlap", "d_scores", "d_overlap"), "square"),
    **dict.fromkeys(("old_d_q", "old_d_k", "old_d_g"), "vector"),
    **dict.fromkeys(("beta", "old_d_beta"), "gate"),
    "first": "first",
    "leave": "leave",
}
"""Kinds of the arrays that kernels read."""


def dot(a: Array, b: Array, low: Any = jnp.float32, contract: tuple[int, int] = (1, 0)) -> Array:
    """Product of two matrices cast to `low`, summed in float32; `contract` names the summed dim of each."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a.astype(low), b.astype(low), dims, precision=HIGHEST, preferred_element_type=jnp.float32)


def count_dot(plan: Plan, mask: Array, x: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    """A matrix of 0 and 1 times x, to 16 bits of x at least."""
    return fine_dot(mask.astype(jnp.float32).astype(plan.low), x, plan.low, contract)


def sums(g: Array, C: int) -> tuple[Array, Array]:
    """Log decays (B, T, ...) summed from the start of each chunk of C on, as two terms.

    The first is in steps of 1/256, the rest in steps of 2^-26 (below, 7e-9 a token, decays are dropped). Both are exact in
    float32 in any order: strong decays take no digits from the mild ones after them, and differences inside a document do
    not depend on the documents before it.
    """
    coarse = jnp.round(g * COARSE) / COARSE
    fine = jnp.round((g - coarse) * FINE) / FINE

    def total(x: Array) -> Array:
        return jnp.cumsum(x.reshape(x.shape[0], -1, C, *x.shape[2:]), axis=2).reshape(x.shape)

    return total(coarse), total(fine)


class Factors(NamedTuple):
    """What decays and borders do in one chunk: factors in [0, 1], 0 where tokens do not meet."""

    pair: Array | None  # (C, C) from key to query; None for a vector decay
    into: Array  # (C,) or (C, K): on what a token reads of the state that enters
    leave: Array  # (C,) or (C, K): on what a token's write leaves in the state that goes out
    survive: Array  # () or (K,): on the state that enters, in the state that goes out


def factors(plan: Plan, first_C: Array, leave_from: Array, load: Callable[[str, Any], Array], rows: Any, end: Any) -> Factors:
    """Factors of the chunk at `rows`, whose last token is `end`.

    Args:
      first_C: place in the chunk of the first token of each token's document, negative if before it; C at padding.
      leave_from: the same of the document that the chunk is left with.
      load: reads an array of sums, named coarse or fine, at rows or at one token.
    """
    place, carried = iota(plan.C), first_C < 0
    ending, through = place >= leave_from, leave_from < 0
    if plan.decay == "none":
        return Factors(*(mask.astype(jnp.float32) for mask in (meet(first_C), carried, ending, through)))
    coarse, fine = load("coarse", rows), load("fine", rows)
    coarse_end, fine_end = load("coarse", end), load("fine", end)
    if plan.decay == "vector":
        carried, ending = carried[:, None], ending[:, None]
        pair, left = None, (coarse_end[None, :] - coarse) + (fine_end[None, :] - fine)
    else:
        between = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
        pair, left = masked_exp(meet(first_C), between), (coarse_end - coarse) + (fine_end - fine)
    into, survive = masked_exp(carried, coarse + fine), masked_exp(through, coarse_end + fine_end)
    return Factors(pair, into, masked_exp(ending, left), survive)


def masked_exp(mask: Array, x: Array) -> Array:
    """exp(x) where the mask is set, else 0."""
    return jnp.exp(jnp.where(mask, x, -jnp.inf))


def iota(size: int) -> Array:
    return jax.lax.iota(jnp.int32, size)


def grid(size: int, dim: int) -> Array:
    """(size, size) place along one dim."""
    return jax.lax.broadcasted_iota(jnp.int32, (size, size), dim)


def meet(first_C: Array) -> Array:
    """(C, C) bool: the key is not after the query and in its document."""
    C = first_C.shape[0]
    return (grid(C, 1) <= grid(C, 0)) & (grid(C, 1) >= first_C[:, None])


def strictly(pair_CC: Array) -> Array:
    """The part below the diagonal."""
    C = pair_CC.shape[0]
    return jnp.where(grid(C, 1) < grid(C, 0), pair_CC, 0.0)


def across(plan: Plan, factor: Array, x_CK: Array, state_KV: Array, product: Callable[..., Array] = fine_dot) -> Array:
    """(C, V): x times the factor (C,) or (C, K), times the state rounded."""
    if factor.ndim == 2:
        return product(x_CK * factor, state_KV.astype(plan.low), plan.low)
    return dot(x_CK, state_KV, plan.low) * factor[:, None]


def outer(plan: Plan, factor: Array, x_CK: Array, y_CV: Array, product: Callable[..., Array] = fine_dot) -> Array:
    """(K, V): the transpose of x times the factor, times y."""
    if factor.ndim == 2:
        return product(x_CK * factor, y_CV, plan.low, (0, 0))
    return product(x_CK, y_CV * factor[:, None], plan.low, (0, 0))


def kept(survive: Array, state_KV: Array) -> Array:
    """The state decayed over the chunk, 0 if a document starts in it."""
    return state_KV * (survive[:, None] if survive.ndim == 1 else survive)
