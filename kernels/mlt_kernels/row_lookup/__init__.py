"""Rows of a table by index, alone or pooled with weights: product-key memories, n-gram tables, value embeddings."""

from collections.abc import Sequence

from jax import Array

from mlt_kernels import dispatch
from mlt_kernels.shapes import Shapes

OP = "row_lookup"


def row_lookup(
    table: Array,
    indices: Array,
    weights: Array | None = None,
    *,
    implementation: str | Sequence[str] | None = None,
) -> Array:
    """Gathers K rows for each token, or their weighted sum:

        out[..., k, :] = table[indices[..., k]]                              without weights
        out[..., :] = sum over k of weights[..., k] * table[indices[..., k]]     with weights

    An index outside [0, M) stands for no row: zeros, and no gradient to the table or to its weight. Indices are
    never clipped and never count from the end. Pooling never holds the (..., K, D) rows, forward or backward.

    Args:
      table: (M, D).
      indices: (..., K) integer.
      weights: (..., K), or None.
      implementation: see `mlt_kernels.dispatch`.

    Returns:
      (..., K, D) in the dtype of the table, or pooled (..., D) in the common dtype of table and weights. Sums over
      k and the table's gradient, a dense (M, D) array, accumulate in float32 (float64 for float64 inputs).

    Raises:
      ValueError, TypeError: a shape or dtype is wrong.
      UnsupportedError: the implementations asked for cannot run this call.

    Sources: arXiv 1907.05242 (product keys), 2412.09764 (memory layers at scale), 2601.07372 (n-gram lookup).
    """
    shapes = Shapes(OP)
    shapes.check("table", table, "M D")
    shapes.check_dtype("indices", indices, "integer")
    if indices.ndim == 0:
        raise ValueError(f"{OP}: indices has shape (); expected (..., K)")
    if weights is not None:
        shapes.check_dtype("weights", weights, "floating")
        if weights.shape != indices.shape:
            raise ValueError(f"{OP}: weights has shape {weights.shape}; expected that of indices, {indices.shape}")
    flat = indices.reshape(-1, indices.shape[-1])
    arguments = {
        "table": table,
        "indices": flat,
        "weights": None if weights is None else weights.reshape(flat.shape),
    }
    rows = dispatch.call(OP, implementation, arguments)
    return rows.reshape(*indices.shape[: None if weights is None else -1], shapes["D"])
