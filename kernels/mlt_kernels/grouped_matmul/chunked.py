"""Blocks of R rows of one group at a time, cut from the sorted rows where they stand.

A loop over the experts holds a loop over the blocks of its group, as many as the group needs. A group's last block
reaches into the next group, or back from the end of the rows; the rows that are not the group's keep what they held. So
nothing is gathered, nothing padded, and each weight is read once.

Every product has the same shape whatever the sizes, and a row of it does not depend on the others: this is what
isolates rows to the bit. The gradient of the weights is a sum over rows, and takes longer blocks where they fit.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

MOST_ROWS, LEAST_ROWS = 64, 8
"""Rows of a block."""
LONG = 256
"""Rows of a block whose product with another is summed over rows."""


def unsupported(**_: object) -> str | None:
    return None


def run(*, lhs: Array, rhs: Array, group_sizes: Array) -> Array:
    return _grouped(lhs, rhs, group_sizes)


@jax.custom_vjp
def _grouped(lhs: Array, rhs: Array, group_sizes: Array) -> Array:
    return _rows_times_group(lhs, rhs, group_sizes, "rk,kn->rn")


def _fwd(lhs: Array, rhs: Array, group_sizes: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return _grouped(lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _bwd(residuals: tuple[Array, Array, Array], d_out: Array) -> tuple[Array, Array, None]:
    lhs, rhs, group_sizes = residuals
    d_lhs = _rows_times_group(d_out, rhs, group_sizes, "rn,kn->rk")
    return d_lhs, _sums_over_groups(lhs, d_out, group_sizes).astype(rhs.dtype), None


_grouped.defvjp(_fwd, _bwd)


def _rows_times_group(x: Array, rhs: Array, group_sizes: Array, formula: str) -> Array:
    """x (M, K) times its group's rhs (K, N) by `formula`; rows of no group give 0."""
    M, R = x.shape[0], _block_rows(x.shape[0], rhs.shape[0])
    wide = jnp.result_type(jnp.float32, x)
    width = rhs.shape[2 if formula.endswith("n") else 1]

    def group(out: Array, xs: tuple[Array, Array, Array]) -> tuple[Array, None]:
        start, size, weight = xs

        def block(b: Array, out: Array) -> Array:
            at = jnp.minimum(start + b * R, M - R)
            rows = jnp.einsum(formula, _cut(x, at, R), weight, preferred_element_type=wide).astype(out.dtype)
            rows = jnp.where(_mine(at, R, start, size), rows, _cut(out, at, R))
            return lax.dynamic_update_slice_in_dim(out, rows, at, 0)

        return lax.fori_loop(0, _blocks(size, R), block, out), None

    out, _ = lax.scan(group, jnp.zeros((M, width), x.dtype), (_starts(group_sizes), group_sizes, rhs))
    return out


def _sums_over_groups(lhs: Array, d_out: Array, group_sizes: Array) -> Array:
    """lhs^T d_out of each group, (E, K, N)."""
    M, R = lhs.shape[0], _block_rows(lhs.shape[0], group_sizes.shape[0])
    long = max(R, min(M, LONG))
    wide = jnp.result_type(jnp.float32, lhs)

    def group(_: None, xs: tuple[Array, Array]) -> tuple[None, Array]:
        start, size = xs

        def product(rows_RK: Array, rows_RN: Array) -> Array:
            return jnp.einsum("rk,rn->kn", rows_RK, rows_RN, preferred_element_type=wide)

        def long_block(b: Array, total: Array) -> Array:
            return total + product(*(_cut(x, start + b * long, long) for x in (lhs, d_out)))

        def block(b: Array, total: Array) -> Array:
            first = start + whole * long + b * R
            at = jnp.minimum(first, M - R)
            mine_R1 = _mine(at, R, first, start + size - first)
            return total + product(*(jnp.where(mine_R1, _cut(x, at, R), 0) for x in (lhs, d_out)))

        whole = size // long
        zero = jnp.zeros((lhs.shape[1], d_out.shape[1]), wide)
        total = lax.fori_loop(0, whole, long_block, zero)
        return None, lax.fori_loop(0, _blocks(size - whole * long, R), block, total)

    return lax.scan(group, None, (_starts(group_sizes), group_sizes))[1]


def _block_rows(M: int, E: int) -> int:
    """Rows a block: a power of two near the mean group, so that small groups do not waste a large block."""
    mean = -(-M // max(E, 1))
    return min(M, MOST_ROWS, max(LEAST_ROWS, 1 << max(0, mean - 1).bit_length()))


def _blocks(size: Array, R: int) -> Array:
    return (size + R - 1) // R


def _starts(group_sizes: Array) -> Array:
    return jnp.cumsum(group_sizes).astype(group_sizes.dtype) - group_sizes


def _mine(at: Array, R: int, start: Array, size: Array) -> Array:
    """(R, 1): which of the rows from `at` on are among the `size` rows from `start` on."""
    row_R1 = (at + jnp.arange(R))[:, None]
    return (row_R1 >= start) & (row_R1 < start + size)


def _cut(x: Array, at: Array, R: int) -> Array:
    return lax.dynamic_slice_in_dim(x, at, R)
