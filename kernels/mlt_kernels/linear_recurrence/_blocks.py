"""Unit lower triangular solves by blocks, in matrix products."""

import jax
import jax.numpy as jnp
from jax import Array

HIGHEST = jax.lax.Precision.HIGHEST
LEAF = 8


def inverse(strict_YCC: Array) -> Array:
    """(I + L)^-1 of strictly lower triangular L (Y, C, C), C a power of two.

    Forward substitution on small diagonal blocks, then [[A, 0], [L, B]]^-1 = [[A^-1, 0], [-B^-1 L A^-1, B^-1]].
    The product of (I + (-L)^(2^i)) is shorter but loses everything to cancellation where keys are correlated.
    """
    C = strict_YCC.shape[1]
    size = min(C, LEAF)
    leaves = _blocks(strict_YCC, size)

    def eliminate(j: Array, blocks: Array) -> Array:
        column = jax.lax.dynamic_slice_in_dim(leaves, j, 1, axis=2)
        return blocks - column * jax.lax.dynamic_slice_in_dim(blocks, j, 1, axis=1)

    identity = jnp.broadcast_to(jnp.eye(size, dtype=strict_YCC.dtype), leaves.shape)
    blocks = jax.lax.fori_loop(0, size - 1, eliminate, identity)
    while size < C:
        pairs = blocks.reshape(-1, 2, size, size)
        top, bottom = pairs[:, 0], pairs[:, 1]
        below = _blocks(strict_YCC, 2 * size)[:, size:, :size]
        corner = -_matmul(bottom, _matmul(below, top))
        upper = jnp.concatenate([top, jnp.zeros_like(top)], axis=2)
        blocks = jnp.concatenate([upper, jnp.concatenate([corner, bottom], axis=2)], axis=1)
        size *= 2
    return blocks


@jax.custom_vjp
def solve(strict_YCC: Array, rhs_YCV: Array) -> Array:
    """(I + L)^-1 R. Its gradient is two products with the inverse, which is never differentiated itself."""
    return _solve_fwd(strict_YCC, rhs_YCV)[0]


def _solve_fwd(strict_YCC: Array, rhs_YCV: Array) -> tuple[Array, tuple[Array, Array]]:
    inverse_YCC = inverse(strict_YCC)
    solution_YCV = _matmul(inverse_YCC, rhs_YCV)
    return solution_YCV, (inverse_YCC, solution_YCV)


def _solve_bwd(residuals: tuple[Array, Array], grad_YCV: Array) -> tuple[Array, Array]:
    inverse_YCC, solution_YCV = residuals
    grad_rhs_YCV = _matmul(jnp.swapaxes(inverse_YCC, 1, 2), grad_YCV)
    grad_YCC = _matmul(grad_rhs_YCV, jnp.swapaxes(solution_YCV, 1, 2))
    return -jnp.tril(grad_YCC, -1), grad_rhs_YCV


solve.defvjp(_solve_fwd, _solve_bwd)


def _blocks(matrix_YCC: Array, size: int) -> Array:
    """The diagonal blocks, (Y C / size, size, size)."""
    C = matrix_YCC.shape[1]
    blocks = [matrix_YCC[:, i : i + size, i : i + size] for i in range(0, C, size)]
    return jnp.stack(blocks, axis=1).reshape(-1, size, size)


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=HIGHEST)
