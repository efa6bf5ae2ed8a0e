"""Products of a vector with rows of a table by index: experts of one neuron, pre-values of a memory."""

from collections.abc import Sequence

from jax import Array

from mlt_kernels import dispatch
from mlt_kernels.shapes import Shapes

OP = "row_dot"


def row_dot(
    table: Array,
    indices: Array,
    x: Array,
    *,
    implementation: str | Sequence[str] | None = None,
) -> Array:
    """Multiplies K rows for each token with the token's vector:

        out[..., k] = sum over d of table[indices[..., k], d] * x[..., d]

    An index outside [0, M) stands for no row: zero, and no gradient. Indices are never clipped and never count from
    the end. The (..., K, D) rows are never held all at once, forward or backward.

    Args:
      table: (M, D).
      indices: (..., K) integer.
      x: (..., D).
      implementation: see `mlt_kernels.dispatch`.

    Returns:
      (..., K) in float32 (float64 for float64 inputs): a score. Gradients accumulate alike.

    Raises:
      ValueError, TypeError: a shape or dtype is wrong.
      UnsupportedError: the implementations asked for cannot run this call.

    Sources: arXiv 2407.04153 (a million experts), 2508.18756 (UltraMemV2).
    """
    shapes = Shapes(OP)
    shapes.check("table", table, "M D")
    shapes.check_dtype("indices", indices, "integer")
    shapes.check_dtype("x", x, "floating")
    if indices.ndim == 0:
        raise ValueError(f"{OP}: indices has shape (); expected (..., K)")
    wanted = (*indices.shape[:-1], shapes["D"])
    if x.shape != wanted:
        raise ValueError(f"{OP}: x has shape {x.shape}; expected {wanted}, the tokens of indices and the width of table")
    arguments = {"table": table, "indices": indices.reshape(-1, indices.shape[-1]), "x": x.reshape(-1, shapes["D"])}
    return dispatch.call(OP, implementation, arguments).reshape(indices.shape)
