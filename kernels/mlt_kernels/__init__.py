"""Pure kernels of mlt: functions of local arrays that know no mesh, config or module system.

Every op has a plain `reference`, a portable `chunked` form and, where it pays, hardware backends; see `dispatch`.
"""

from mlt_kernels.attention import attention
from mlt_kernels.causal_conv import causal_conv
from mlt_kernels.cross_entropy import cross_entropy
from mlt_kernels.diagonal_recurrence import diagonal_recurrence
from mlt_kernels.grouped_matmul import grouped_matmul
from mlt_kernels.grouped_swiglu import grouped_swiglu
from mlt_kernels.linear_recurrence import linear_recurrence
from mlt_kernels.row_dot import row_dot
from mlt_kernels.row_lookup import row_lookup
from mlt_kernels.selective_scan import selective_scan
from mlt_kernels.test_time_memory import test_time_memory

__all__ = [
    "attention",
    "causal_conv",
    "cross_entropy",
    "diagonal_recurrence",
    "grouped_matmul",
    "grouped_swiglu",
    "linear_recurrence",
    "row_dot",
    "row_lookup",
    "selective_scan",
    "test_time_memory",
]
