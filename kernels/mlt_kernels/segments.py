"""Document starts from segment ids, as every op reads them.

`segment_ids` (B, T) names the document of each token; 0 is padding. Documents are contiguous runs of a row.
Token 0 is no start here: a carried-in state or halo continues into the first run, and where there is none the
carried value is zero anyway.
"""

import jax.numpy as jnp
from jax import Array


def starts(segment_ids_BT: Array) -> Array:
    """(B, T) bool: the token opens a document. Padding opens none: it must leave a carried state as it is."""
    changed = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    first = jnp.zeros_like(segment_ids_BT[:, :1], bool)
    return jnp.concatenate([first, changed], axis=1) & (segment_ids_BT != 0)
