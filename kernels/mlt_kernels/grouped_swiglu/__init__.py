"""The experts of a mixture: one SwiGLU per group of rows, applied to tokens sorted by expert."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from mlt_kernels import dispatch
from mlt_kernels.grouped_matmul import grouped_matmul
from mlt_kernels.shapes import Shapes

OP = "grouped_swiglu"


def grouped_swiglu(
    x: Array,
    gate: Array,
    up: Array,
    down: Array,
    group_sizes: Array,
    *,
    hidden_name: str | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Array:
    """The rows of `x` come in E consecutive groups; those of group e go through its network:

        start_e = sum(group_sizes[:e])
        out[i] = (silu(x[i] gate[e]) * (x[i] up[e])) down[e]      for start_e <= i < start_e + group_sizes[e]
        out[i] = 0                                                for i >= sum(group_sizes)

    `chunked` takes each block of rows through all three products while it lies in the cache. Without a gradient no array of
    hidden units is made; for one the products with gate and up are kept, and the hidden units computed again. Rows are isolated
    to the bit: an output row and its gradient depend on that row, its cotangent and its expert alone. Any other backend of
    `grouped_matmul` is called three times.

    Args:
      x: (M, D), rows sorted by group.
      gate, up: (E, D, F).
      down: (E, F, D).
      group_sizes: (E,) int32, at least 0, of sum at most M (not checked: it is data).
      hidden_name: a name for `jax.checkpoint` policies, of the array (M, F) of hidden rows that three products make, and of the
        two that `chunked` keeps.
      implementation: a backend of `grouped_matmul`, see `mlt_kernels.dispatch`.

    Returns:
      out (M, D) in the common dtype of x and the weights; sums are float32 (float64 for float64 inputs).

    Raises:
      ValueError, TypeError: a shape or dtype is wrong.
      UnsupportedError: the implementations asked for cannot run this call.

    Sources: arXiv 2002.05202 (SwiGLU), 2211.15841 (block-sparse experts without dropped tokens).
    """
    shapes = Shapes(OP)
    shapes.check("x", x, "M D")
    shapes.check("gate", gate, "E D F")
    shapes.check("up", up, "E D F")
    shapes.check("down", down, "E F D")
    shapes.check("group_sizes", group_sizes, "E", kind="integer")
    dtype = jnp.result_type(x, gate, up, down)
    x, gate, up, down = (a.astype(dtype) for a in (x, gate, up, down))
    chosen = dispatch.choose("grouped_matmul", implementation, {"lhs": x, "rhs": gate, "group_sizes": group_sizes})
    if chosen in dispatch.selectable(OP):
        arguments = {"x": x, "gate": gate, "up": up, "down": down, "group_sizes": group_sizes, "hidden_name": hidden_name}
        return dispatch.call(OP, chosen, arguments)

    def product(rows: Array, weight: Array) -> Array:
        return grouped_matmul(rows, weight, group_sizes, implementation=implementation)

    hidden = jax.nn.silu(product(x, gate)) * product(x, up)
    if hidden_name is not None:
        hidden = checkpoint_name(hidden, hidden_name)
    return product(hidden, down)
