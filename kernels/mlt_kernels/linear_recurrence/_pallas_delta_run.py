"""Delta rule on a GPU, the *run* kernel: one loop over the chunks with the state in registers.

In a chunk entered with state S, with D decays between tokens, T . D the stored inverse, G their sums since the chunk began,

    W  = (T . D) beta (V - exp(G) K S)                    what is written
    O  = scale (exp(G) Q S + (Q K^T . D) W)
    S' = exp(G_end) S + (exp(G_end - G) K)^T W

Only O leaves, and the last state. The backward pass runs the same loop without O and keeps W and every chunk's S.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from mlt_kernels.linear_recurrence._pallas_delta_chunk import (
    INVERSE,
    Factors,
    Plan,
    Refs,
    across,
    dot,
    factors,
    kept,
    outer,
    strictly,
)
from mlt_kernels.linear_recurrence._pallas_delta_parts import fine_dot, parts, parts_dot

SHARED = ("k", "beta", "first", "leave", *INVERSE, "coarse", "fine", "overlap")


def forward(plan: Plan, x: dict[str, Array]) -> dict[str, Array]:
    """`o` and `last` from q, k, v, beta, state, the inverse (scores), sums of decays and borders; if the
    plan says so also `states`, float32."""
    outputs = {"o": (x["v"].dtype, "value"), "last": (jnp.float32, "state")}
    if plan.states:
        outputs["states"] = (jnp.float32, "states")
    names = [*SHARED, "q", "v", "state", "scores"]
    return plan.sweep(functools.partial(_run_kernel, plan=plan), pick(x, names), outputs)


def states(plan: Plan, x: dict[str, Array]) -> dict[str, Array]:
    """`states` that enter the chunks and all that is written, `write`."""
    outputs = {"states": (plan.low, "states"), "write": (jnp.float32, "value")}
    return plan.sweep(functools.partial(_run_kernel, plan=plan), pick(x, [*SHARED, "v", "state"]), outputs)


def pick(x: dict[str, Array], names: list[str]) -> dict[str, Array]:
    return {name: x[name] for name in names if name in x}


def sweep_factors(plan: Plan, x: Refs, n: Array, rows: Any) -> Any:
    """`factors` of chunk n in a kernel that holds all tokens."""

    def load(name: str, at: Any) -> Array:
        return x[name][at, :] if plan.decay == "vector" else x[name][at]

    return factors(plan, x["first"][rows], x["leave"][n], load, rows, n * plan.C + plan.C - 1)


def overlap(plan: Plan, x: Refs, f: Factors, n: Array, k_CK: Array, beta_C: Array) -> Array | None:
    """S . D of chunk n if the plan refines."""
    if not plan.refine:
        return None
    if f.pair is None:
        return x["overlap"][n]
    return strictly(dot(k_CK, k_CK, plan.low, (1, 1)) * f.pair) * beta_C[:, None]


def solved(plan: Plan, x: Refs, n: Array, strict_CC: Array | None, right_CV: Array, *, transposed: bool = False) -> Array:
    """(I + S)^-1 R from the stored inverse of chunk n, or with its transpose, refined once where S is given.

    The stored inverse is correct to float32, yet where keys repeat a product with it loses five times as much to rounding
    as substitution would: the refinement takes that back.
    """
    contract = (0, 0) if transposed else (1, 0)
    inverse = [x[name][n] for name in INVERSE if name in x]
    solution = parts_dot(inverse, parts(right_CV, plan.low), plan.low, contract, len(INVERSE))
    if strict_CC is None:
        return solution
    rest = right_CV - solution - dot(strict_CC, solution, plan.low, contract)
    return solution + parts_dot(inverse, [rest], plan.low, contract, len(INVERSE))


def _run_kernel(x: Refs, y: Refs, *, plan: Plan) -> None:
    C, low = plan.C, plan.low

    def chunk(n: Array, state_KV: Array) -> Array:
        rows = pl.ds(n * C, C)
        f = sweep_factors(plan, x, n, rows)
        k_CK, beta_C = x["k"][rows, :], x["beta"][rows]
        if "states" in y:
            y["states"][n] = state_KV.astype(y["states"].dtype)
        right_CV = (x["v"][rows, :] - across(plan, f.into, k_CK, state_KV)) * beta_C[:, None]
        write_CV = solved(plan, x, n, overlap(plan, x, f, n, k_CK, beta_C), right_CV)
        if "write" in y:
            y["write"][rows, :] = write_CV.astype(y["write"].dtype)
        if "o" in y:
            q_CK = x["q"][rows, :]
            scores_CC = x["scores"][n] if f.pair is None else dot(q_CK, k_CK, low, (1, 1)) * f.pair
            o_CV = across(plan, f.into, q_CK, state_KV, dot) + fine_dot(scores_CC, write_CV, low)
            y["o"][rows, :] = (plan.scale * o_CV).astype(y["o"].dtype)
        return kept(f.survive, state_KV) + outer(plan, f.leave, k_CK, write_CV)

    last_KV = jax.lax.fori_loop(0, plan.J, chunk, x["state"][...])
    if "last" in y:
        y["last"][...] = last_KV
