"""A state tree as a flat table: path -> array, with shapes, types and digests, and the comparison of two such tables."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_SHOWN = 20  # lines of a difference that are printed


class Leaf(NamedTuple):
    """What a checkpoint records of one array.

    Attributes:
      shape: the logical shape (of the keys themselves for typed PRNG keys).
      dtype: the name of the element type, e.g. "bfloat16" or "key<fry>".
      digest: hash over the bits, see `mlt.checkpoint.digest`; empty for a target that holds no values.
      key_impl: the name of the PRNG implementation of typed keys.
    """

    shape: tuple[int, ...]
    dtype: str
    digest: str = ""
    key_impl: str | None = None

    def describe(self) -> str:
        """Give the type and shape in one word, e.g. float32[4,8]."""
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def is_key(array: Any) -> bool:
    """Tell whether an array or a ShapeDtypeStruct holds typed PRNG keys."""
    return jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def flatten(tree: Any, *, prefix: str = "") -> dict[str, Any]:
    """Flatten a tree into path -> leaf, with paths such as "params/blocks/0/w".

    Raises:
      TypeError: a leaf is not an array (or a ShapeDtypeStruct), or two leaves have the same path.
    """
    flat: dict[str, Any] = {}
    for key_path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        path = prefix + (jax.tree_util.keystr(key_path, simple=True, separator="/") or "value")
        if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
            raise TypeError(f"state leaf {path} is {type(leaf).__name__}; a state holds jax arrays only")
        if path in flat:
            raise TypeError(f"two leaves of the state have the path {path}")
        flat[path] = leaf
    return flat


def table(flat: Mapping[str, Any], digests: Mapping[str, str] | None = None) -> dict[str, Leaf]:
    """Describe flat leaves (arrays or ShapeDtypeStructs) as a table."""
    rows = {}
    for path, leaf in flat.items():
        impl = str(jax.random.key_impl(leaf)) if isinstance(leaf, jax.Array) and is_key(leaf) else None
        rows[path] = Leaf(tuple(leaf.shape), _dtype_name(leaf.dtype), (digests or {}).get(path, ""), impl)
    return rows


def to_json(rows: Mapping[str, Leaf]) -> dict[str, Any]:
    """Give a table as JSON-ready lists."""
    return {path: [list(row.shape), *row[1:]] for path, row in rows.items()}


def from_json(rows: Mapping[str, Any]) -> dict[str, Leaf]:
    """Read a table back from `to_json`."""
    return {path: Leaf(tuple(shape), *rest) for path, (shape, *rest) in rows.items()}


def difference(saved: Mapping[str, Leaf], wanted: Mapping[str, Leaf]) -> str:
    """Say how a saved tree differs from the wanted one, in lines; empty when paths, shapes and types all agree."""
    missing = [f"{path}  {wanted[path].describe()}" for path in wanted if path not in saved]
    extra = [f"{path}  {saved[path].describe()}" for path in saved if path not in wanted]
    changed = [
        f"{path}  checkpoint {saved[path].describe()}, wanted {wanted[path].describe()}"
        for path in wanted
        if path in saved and saved[path][:2] != wanted[path][:2]
    ]
    groups = {
        "not in the checkpoint": missing,
        "only in the checkpoint": extra,
        "other shape or type": changed,
    }
    lines, left = [], _SHOWN
    for title, entries in groups.items():
        if entries:
            shown = entries[: max(left, 1)]
            left -= len(shown)
            more = [f"    ... and {len(entries) - len(shown)} more"] if len(shown) < len(entries) else []
            lines += [f"  {title} ({len(entries)}):", *(f"    {entry}" for entry in shown), *more]
    return "\n".join(lines)


def _dtype_name(dtype: Any) -> str:
    return str(dtype) if jnp.issubdtype(dtype, jax.dtypes.prng_key) else np.dtype(dtype).name
