"""A block of tokens at a time, so that the rows of one block alone exist.

Products and pooling are each other's transposes: the gradient of x pools the rows with the cotangent as weights, and
the table's gradient is that of such a pooling. Both are `row_lookup`'s.

Letters: T tokens, J blocks of C tokens; others as in row_dot.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from mlt_kernels.row_lookup import row_lookup
from mlt_kernels.row_lookup.chunked import tokens_at_once


def unsupported(**_: Any) -> str | None:
    return None


@jax.custom_vjp
def _products(table: Array, indices: Array, x: Array) -> Array:
    wide = jnp.result_type(jnp.float32, table, x)
    T, K = indices.shape
    C = tokens_at_once(T, K)
    J = -(-T // C)
    found_TK = (indices >= 0) & (indices < table.shape[0])

    def block(xs: tuple[Array, Array]) -> Array:
        index_CK, x_CD = xs
        rows_CKD = table.at[index_CK].get(mode="promise_in_bounds").astype(wide)
        return jnp.einsum("ckd,cd->ck", rows_CKD, x_CD.astype(wide), precision=lax.Precision.HIGHEST)

    padded = tuple(jnp.pad(a, ((0, J * C - T), (0, 0))) for a in (jnp.where(found_TK, indices, 0), x))
    products_TK = lax.map(block, tuple(a.reshape(J, C, a.shape[-1]) for a in padded)).reshape(J * C, K)[:T]
    return jnp.where(found_TK, products_TK, 0)


def _products_fwd(table: Array, indices: Array, x: Array) -> Any:
    return _products(table, indices, x), (table, indices, x)


def _products_bwd(residuals: Any, d_out_TK: Array) -> Any:
    table, indices, x = residuals
    wide = d_out_TK.dtype
    d_x = row_lookup(table, indices, d_out_TK, implementation="chunked")
    # The forward pass of this pooling is dead code: only its gradient is asked for.
    pool = lambda t: row_lookup(t, indices, d_out_TK, implementation="chunked")  # noqa: E731
    (d_table,) = jax.vjp(pool, table)[1](x.astype(wide))
    return d_table, None, d_x.astype(x.dtype)


_products.defvjp(_products_fwd, _products_bwd)


def run(*, table: Array, indices: Array, x: Array) -> Array:
    return _products(table, indices, x)
