"""Unit lower triangular solves by blocks, in matrix products."""

import jax
import jax.numpy as jnp
from jax import Array

HIGHEST = jax.lax.Precision.HIGHEST
LEAF = 8
BLOCK = 16


@jax.custom_vjp
def solve(strict_YCC: Array, rhs_YCV: Array) -> Array:
    """(I + L)^-1 R for strictly lower triangular L, C a power of two.

    Blocks of 16 are inverted and substituted one after the other. Inverting all of L costs the same and loses five
    times as much to rounding where keys repeat; the product of (I + (-L)^(2^i)) loses everything there. The gradient
    is one solve with the transpose: the inverses are never differentiated.
    """
    return _solve_fwd(strict_YCC, rhs_YCV)[0]


def _solve_fwd(strict_YCC: Array, rhs_YCV: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    Y, C, _ = strict_YCC.shape
    size = min(BLOCK, C)
    inverses_YJCC = _inverse(_diagonal_blocks(strict_YCC, size)).reshape(Y, C // size, size, size)
    solution = jnp.zeros((Y, 0, rhs_YCV.shape[2]), rhs_YCV.dtype)
    for n, i in enumerate(range(0, C, size)):
        rest = rhs_YCV[:, i : i + size]
        if i:
            rest = rest - _matmul(strict_YCC[:, i : i + size, :i], solution)
        solution = jnp.concatenate([solution, _matmul(inverses_YJCC[:, n], rest)], axis=1)
    return solution, (strict_YCC, inverses_YJCC, solution)


def _solve_bwd(residuals: tuple[Array, Array, Array], grad_YCV: Array) -> tuple[Array, Array]:
    strict_YCC, inverses_YJCC, solution_YCV = residuals
    C, size = strict_YCC.shape[1], inverses_YJCC.shape[2]
    grad_rhs = jnp.zeros((grad_YCV.shape[0], 0, grad_YCV.shape[2]), grad_YCV.dtype)
    for n, i in reversed(list(enumerate(range(0, C, size)))):
        rest = grad_YCV[:, i : i + size]
        if i + size < C:
            below = strict_YCC[:, i + size :, i : i + size]
            rest = rest - _matmul(jnp.swapaxes(below, 1, 2), grad_rhs)
        block = _matmul(jnp.swapaxes(inverses_YJCC[:, n], 1, 2), rest)
        grad_rhs = jnp.concatenate([block, grad_rhs], axis=1)
    grad_YCC = _matmul(grad_rhs, jnp.swapaxes(solution_YCV, 1, 2))
    return -jnp.tril(grad_YCC, -1), grad_rhs


solve.defvjp(_solve_fwd, _solve_bwd)


def _inverse(strict_XCC: Array) -> Array:
    """(I + L)^-1: substitution on the diagonal blocks, [[A, 0], [L, B]]^-1 = [[A^-1, 0], [-B^-1 L A^-1, B^-1]]."""
    C = strict_XCC.shape[1]
    size = min(C, LEAF)
    leaves = _diagonal_blocks(strict_XCC, size)

    def eliminate(j: Array, blocks: Array) -> Array:
        column = jax.lax.dynamic_slice_in_dim(leaves, j, 1, axis=2)
        return blocks - column * jax.lax.dynamic_slice_in_dim(blocks, j, 1, axis=1)

    identity = jnp.broadcast_to(jnp.eye(size, dtype=strict_XCC.dtype), leaves.shape)
    blocks = jax.lax.fori_loop(0, size - 1, eliminate, identity)
    while size < C:
        pairs = blocks.reshape(-1, 2, size, size)
        top, bottom = pairs[:, 0], pairs[:, 1]
        below = _diagonal_blocks(strict_XCC, 2 * size)[:, size:, :size]
        corner = -_matmul(bottom, _matmul(below, top))
        upper = jnp.concatenate([top, jnp.zeros_like(top)], axis=2)
        blocks = jnp.concatenate([upper, jnp.concatenate([corner, bottom], axis=2)], axis=1)
        size *= 2
    return blocks


def _diagonal_blocks(matrix_XCC: Array, size: int) -> Array:
    """(X C / size, size, size)."""
    C = matrix_XCC.shape[1]
    blocks = [matrix_XCC[:, i : i + size, i : i + size] for i in range(0, C, size)]
    return jnp.stack(blocks, axis=1).reshape(-1, size, size)


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=HIGHEST)
