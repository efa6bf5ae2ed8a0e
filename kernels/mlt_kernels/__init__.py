"""Pure kernels of mlt: functions of local arrays that know no mesh, config or module system.

Every op has a plain `reference`, a portable `chunked` form and, where it pays, hardware backends; see `dispatch`.
"""

import importlib

for _name in ("attention", "causal_conv", "cross_entropy", "diagonal_recurrence", "grouped_matmul", "linear_recurrence", "row_lookup"):
    try:
        globals()[_name] = getattr(importlib.import_module(f"{__name__}.{_name}"), _name)
    except (ImportError, AttributeError, SyntaxError):  # interim
        pass
