"""The legend of shape letters, and the checks of array arguments that every public function shares."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

LEGEND = {
    "B": "batch: packed rows",
    "T": "tokens of a row (query positions)",
    "S": "key positions",
    "D": "model width, or channels",
    "N": "query heads",
    "H": "value heads of a recurrence; head dim of attention",
    "Hk": "query/key heads of a recurrence; divides H",
    "K": "key dim of a recurrence; key/value heads of attention",
    "V": "value dim of a recurrence; vocabulary of a loss",
    "C": "chunk length",
    "J": "chunks of a row",
    "F": "feed-forward width",
    "E": "experts, or groups of rows",
    "M": "memory rows",
    "W": "window, or convolution width",
    "L": "layers",
}
"""Suffix letters of array names. Where a letter has two meanings, each file's docstring says which it uses."""


class Shapes:
    """Checks the array arguments of one call and binds shape letters to sizes.

        shapes = Shapes("linear_recurrence")
        shapes.check("q", q, "B T Hk K")
        shapes.check("v", v, "B T H V")
        shapes["H"]

    A dim is a letter, an integer, or `...` (any number of dims, last only).
    """

    def __init__(self, op: str):
        self.op = op
        self.sizes: dict[str, int] = {}
        self._bound_by: dict[str, str] = {}

    def __getitem__(self, letter: str) -> int:
        return self.sizes[letter]

    def check(self, name: str, array: Any, dims: str, *, kind: str | Sequence[str] = "floating") -> None:
        """Raises unless `array` has shape `dims` (letters already bound must agree) and a dtype of `kind`.

        `kind` is one or more of `floating`, `integer`, `complex`, `bool`.
        """
        self.check_dtype(name, array, kind)
        letters = dims.split()
        open_ended = bool(letters) and letters[-1] == "..."
        if open_ended:
            letters = letters[:-1]
        shape = tuple(array.shape)
        bad_rank = len(shape) < len(letters) if open_ended else len(shape) != len(letters)
        wanted = [int(d) if d.isdigit() else self.sizes.get(d) for d in letters]
        if bad_rank or any(w is not None and w != s for w, s in zip(wanted, shape, strict=False)):
            raise ValueError(f"{self.op}: {name} has shape {shape}; expected {self._describe(letters, open_ended)}")
        for letter, size in zip(letters, shape, strict=False):
            if not letter.isdigit() and letter not in self.sizes:
                self.sizes[letter] = size
                self._bound_by[letter] = name

    def check_dtype(self, name: str, array: Any, kind: str | Sequence[str]) -> None:
        """Raises TypeError unless `array` is an array with a dtype of one of the kinds."""
        kinds = (kind,) if isinstance(kind, str) else tuple(kind)
        if not hasattr(array, "dtype") or not hasattr(array, "shape"):
            raise TypeError(f"{self.op}: {name} must be an array, got {type(array).__name__}")
        groups = {
            "floating": jnp.floating,
            "integer": jnp.integer,
            "complex": jnp.complexfloating,
            "bool": jnp.bool_,
        }
        if not any(jnp.issubdtype(array.dtype, groups[k]) for k in kinds):
            raise TypeError(f"{self.op}: {name} has dtype {array.dtype}; expected {' or '.join(kinds)}")

    def divides(self, divisor: str, dividend: str) -> None:
        """Raises unless the size bound to `divisor` divides the size bound to `dividend`."""
        small, large = self.sizes[divisor], self.sizes[dividend]
        if small == 0 or large % small:
            raise ValueError(
                f"{self.op}: {divisor}={small} (of {self._bound_by[divisor]}) must divide "
                f"{dividend}={large} (of {self._bound_by[dividend]})"
            )

    def option(self, name: str, value: Any, allowed: Sequence[Any]) -> None:
        """Raises unless `value` is one of `allowed`."""
        if value not in allowed:
            raise ValueError(f"{self.op}: {name}={value!r}; expected one of {', '.join(map(repr, allowed))}")

    def positive(self, name: str, value: Any) -> None:
        """Raises unless `value` is an integer above zero."""
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{self.op}: {name}={value!r}; expected an integer of at least 1")

    def _describe(self, letters: Sequence[str], open_ended: bool) -> str:
        names = ", ".join([*letters, *(["..."] if open_ended else [])])
        known = [f"{d}={self.sizes[d]} from {self._bound_by[d]}" for d in letters if d in self.sizes]
        return f"({names})" + (f" with {', '.join(dict.fromkeys(known))}" if known else "")
