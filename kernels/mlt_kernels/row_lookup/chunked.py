"""One slot k of all tokens, or all slots of a block of tokens, at a time.

Pooling scans over k, several slots an iteration. The table's gradient scatters into one float32 array, by slots, or on a
CPU by blocks whose rows stay in its cache, at three quarters of the time. Measured there, sorting the indices costs as much
as all the scatters together, and every form that sums sorted runs was 1.4 to 2 times slower. The gradient of the weights goes
by blocks of tokens, whose rows it gathers and multiplies.

Letters: T tokens, J blocks of C tokens; others as in row_lookup.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from mlt_kernels import dispatch

SLOTS_AT_ONCE = 8
MOST_BLOCKS = 256
ROWS_AT_ONCE = 1024
ROWS_AT_ONCE_ON_CPU = 512


def unsupported(**_: Any) -> str | None:
    return None


def run(*, table: Array, indices: Array, weights: Array | None) -> Array:
    return _gather(table, indices) if weights is None else _pool(table, indices, weights)


@jax.custom_vjp
def _gather(table: Array, indices: Array) -> Array:
    found_TK, index_TK = _resolve(table, indices)
    return jnp.where(found_TK[..., None], _rows(table, index_TK), 0)


def _gather_fwd(table: Array, indices: Array) -> Any:
    return _gather(table, indices), (table, indices)


def _gather_bwd(residuals: Any, d_rows_TKD: Array) -> Any:
    table, indices = residuals
    zeros = jnp.zeros(table.shape, jnp.result_type(jnp.float32, table))
    d_table = _add_rows(zeros, indices.reshape(-1), d_rows_TKD.reshape(-1, table.shape[1]))
    return d_table.astype(table.dtype), None


_gather.defvjp(_gather_fwd, _gather_bwd)


@jax.custom_vjp
def _pool(table: Array, indices: Array, weights: Array) -> Array:
    wide = jnp.result_type(jnp.float32, table, weights)
    found_TK, index_TK = _resolve(table, indices)
    weight_TK = jnp.where(found_TK, weights.astype(wide), 0)

    def slot(total_TD: Array, xs: tuple[Array, Array]) -> tuple[Array, None]:
        index_T, weight_T = xs
        return total_TD + weight_T[:, None] * _rows(table, index_T).astype(wide), None

    zeros = jnp.zeros((indices.shape[0], table.shape[1]), wide)
    total_TD, _ = lax.scan(slot, zeros, (index_TK.T, weight_TK.T), unroll=SLOTS_AT_ONCE)
    return total_TD.astype(jnp.result_type(table, weights))


def _pool_fwd(table: Array, indices: Array, weights: Array) -> Any:
    return _pool(table, indices, weights), (table, indices, weights)


def _pool_bwd(residuals: Any, d_out_TD: Array) -> Any:
    table, indices, weights = residuals
    wide = jnp.result_type(jnp.float32, table, weights)
    d_out_TD = d_out_TD.astype(wide)
    scatter = _scatter_blocks if dispatch.platform() == "cpu" else _scatter_slots
    d_table = scatter(jnp.zeros(table.shape, wide), indices, weights.astype(wide), d_out_TD)
    d_weights = _row_products(table, indices, d_out_TD)
    return d_table.astype(table.dtype), None, d_weights.astype(weights.dtype)


_pool.defvjp(_pool_fwd, _pool_bwd)


def tokens_at_once(T: int, K: int) -> int:
    """Tokens in a block: few enough rows for a CPU's cache, few enough blocks for a device that starts each anew."""
    if dispatch.platform() == "cpu":
        return max(1, min(T, ROWS_AT_ONCE_ON_CPU // max(K, 1)))
    return max(1, min(T, max(ROWS_AT_ONCE // max(K, 1), -(-T // MOST_BLOCKS))))


def _scatter_slots(d_table: Array, indices: Array, weight_TK: Array, d_out_TD: Array) -> Array:
    """Adds weight_tk d_out_t to row index_tk."""

    def slot(d_table: Array, xs: tuple[Array, Array]) -> tuple[Array, None]:
        index_T, weight_T = xs
        return _add_rows(d_table, index_T, weight_T[:, None] * d_out_TD), None

    return lax.scan(slot, d_table, (indices.T, weight_TK.T))[0]


def _scatter_blocks(d_table: Array, indices: Array, weight_TK: Array, d_out_TD: Array) -> Array:
    """`_scatter_slots`, tokens in the outer loop."""
    T, K = indices.shape
    C = tokens_at_once(T, K)

    def block(d_table: Array, xs: tuple[Array, Array, Array]) -> tuple[Array, None]:
        index_CK, weight_CK, d_out_CD = xs
        rows_CKD = weight_CK[..., None] * d_out_CD[:, None]
        return _add_rows(d_table, index_CK.reshape(-1), rows_CKD.reshape(-1, d_table.shape[1])), None

    end = ((0, -T % C), (0, 0))
    index_TK = jnp.pad(indices, end, constant_values=-1)
    blocks = tuple(x.reshape(-1, C, x.shape[1]) for x in (index_TK, jnp.pad(weight_TK, end), jnp.pad(d_out_TD, end)))
    return lax.scan(block, d_table, blocks)[0]


def _row_products(table: Array, indices: Array, d_out_TD: Array) -> Array:
    """(T, K): d_out_t . table[index_tk], 0 where there is no row."""
    T, K = indices.shape
    C = tokens_at_once(T, K)
    J = -(-T // C)
    found_TK, index_TK = _resolve(table, indices)

    def block(xs: tuple[Array, Array]) -> Array:
        index_CK, d_out_CD = xs
        rows_CKD = _rows(table, index_CK).astype(d_out_TD.dtype)
        return jnp.einsum("ckd,cd->ck", rows_CKD, d_out_CD, precision=lax.Precision.HIGHEST)

    blocks = tuple(jnp.pad(x, ((0, J * C - T), (0, 0))).reshape(J, C, -1) for x in (index_TK, d_out_TD))
    products_TK = lax.map(block, blocks).reshape(J * C, K)[:T]
    return jnp.where(found_TK, products_TK, 0)


def _resolve(table: Array, indices: Array) -> tuple[Array, Array]:
    """Which indices name a row, and indices that all do."""
    found = (indices >= 0) & (indices < table.shape[0])
    return found, jnp.where(found, indices, 0)


def _rows(table: Array, index: Array) -> Array:
    return table.at[index].get(mode="promise_in_bounds")


def _add_rows(table: Array, index: Array, rows: Array) -> Array:
    """Adds `rows` (n, D); a negative index must not count from the end, so it becomes one that is dropped."""
    outside = (index < 0) | (index >= table.shape[0])
    return table.at[jnp.where(outside, table.shape[0], index)].add(rows.astype(table.dtype), mode="drop")
