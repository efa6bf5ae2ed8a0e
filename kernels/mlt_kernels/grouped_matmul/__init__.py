"""One matmul per group of rows: the experts of a mixture, applied to tokens sorted by expert."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from mlt_kernels import dispatch
from mlt_kernels.shapes import Shapes

OP = "grouped_matmul"


def grouped_matmul(
    lhs: Array,
    rhs: Array,
    group_sizes: Array,
    *,
    implementation: str | Sequence[str] | None = None,
) -> Array:
    """The rows of `lhs` come in E consecutive groups; group e is multiplied by rhs[e]:

        start_e = sum(group_sizes[:e])
        out[i] = lhs[i] @ rhs[e]      for start_e <= i < start_e + group_sizes[e]
        out[i] = 0                    for i >= sum(group_sizes)

    Rows are isolated to the bit in `chunked`: an output row and its gradient depend on that row, its cotangent and
    its expert alone, not on the content or the number of the other rows nor on its place among them.

    Args:
      lhs: (M, K), rows sorted by group.
      rhs: (E, K, N).
      group_sizes: (E,) int32, at least 0, of sum at most M (not checked: it is data).
      implementation: see `mlt_kernels.dispatch`.

    Returns:
      out (M, N) in the common dtype of lhs and rhs; sums are float32 (float64 for float64 inputs).

    Raises:
      ValueError, TypeError: a shape or dtype is wrong.
      UnsupportedError: the implementations asked for cannot run this call.

    Source: arXiv 2211.15841 (block-sparse experts without dropped tokens).
    """
    shapes = Shapes(OP)
    shapes.check("lhs", lhs, "M K")
    shapes.check("rhs", rhs, "E K N")
    shapes.check("group_sizes", group_sizes, "E", kind="integer")
    dtype = jnp.result_type(lhs, rhs)
    arguments = {"lhs": lhs.astype(dtype), "rhs": rhs.astype(dtype), "group_sizes": group_sizes}
    return dispatch.call(OP, implementation, arguments)
