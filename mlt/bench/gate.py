"""How far a backend is from float64: values and every gradient, at real tokens.

An error is max |difference| / max |expected| of an array. What stands at padding is nobody's business but must be
finite: cotangents are zero there and it is left out of the comparison.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from mlt_kernels import dispatch
from mlt_kernels.testing import cast_floating, cotangents, relative_error, value_and_grads

Arrays = dict[str, Any]
Fn = Callable[..., Any]
"""(arrays, implementation=) -> result."""

LIMITS = {"float32": 1e-5, "bfloat16": 2e-2}
"""Largest error of a backend by the type of its inputs."""


@functools.cache
def compiled(fn: Fn, implementation: str, wrt: tuple[str, ...]) -> Callable[..., Any]:
    """(arrays, cotangents) -> (result, gradients), compiled once for each shape."""

    def run(arrays: Arrays, cts: Any) -> Any:
        return value_and_grads(lambda **named: fn(named, implementation=implementation), arrays, wrt=wrt, cotangent=cts)

    # On a CPU LLVM's optimization of a token loop takes most of the time, and nobody waits for the reference's result.
    plain = implementation == "reference" and dispatch.platform() == "cpu"
    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0} if plain else None)


@functools.cache
def _reference(fn: Fn) -> Any:
    """Under `jit` only so that the shape of its result is found once for each shape of its arguments."""
    return jax.jit(functools.partial(fn, implementation="reference"))


def outcome(fn: Fn, implementation: str, wrt: tuple[str, ...], arrays: Arrays, real: np.ndarray | None, seed: int = 0) -> Any:
    """(result, gradients) as NumPy arrays, for seeded cotangents that are zero at padding (`real` (B, T) False)."""
    cts = _at_real(cotangents(_reference(fn).eval_shape(arrays), seed), real)
    return jax.tree.map(np.asarray, compiled(fn, implementation, wrt)(arrays, cts))


def float64(fn: Fn, wrt: tuple[str, ...], arrays: Arrays, real: np.ndarray | None = None, seed: int = 0) -> Any:
    """`outcome` of the reference on the same numbers in float64."""
    with jax.enable_x64(True):
        return outcome(fn, "reference", wrt, cast_floating(arrays, jnp.float64), real, seed)


def errors(found: Any, wanted: Any, real: np.ndarray | None = None) -> dict[str, float]:
    """By name: `out`, `more` (the other results together), and `d NAME` for each gradient. Infinite where not finite."""
    (found_out, found_grads), (out, grads) = found, wanted
    by_name: dict[str, float] = {}
    for i, (got, want) in enumerate(zip(jax.tree.leaves(found_out), jax.tree.leaves(out), strict=True)):
        name = "out" if i == 0 else "more"
        by_name[name] = max(by_name.get(name, 0.0), _error(got, want, real))
    for name, tree in grads.items():
        pairs = zip(jax.tree.leaves(found_grads[name]), jax.tree.leaves(tree), strict=True)
        by_name[f"d {name}"] = max((_error(got, want, real) for got, want in pairs), default=0.0)
    return by_name


def _error(got: Any, want: Any, real: np.ndarray | None) -> float:
    got, want = np.asarray(got), np.asarray(want)
    if not np.isfinite(got.astype(np.complex128 if np.iscomplexobj(got) else np.float64)).all():
        return float("inf")
    if real is not None and got.shape[:2] == real.shape:
        got, want = got[real], want[real]
    return relative_error(got, want)


def _at_real(tree: Any, real: np.ndarray | None) -> Any:
    if real is None:
        return tree

    def mask(x: Any) -> Any:
        if x.shape[:2] != real.shape or x.dtype == jax.dtypes.float0:
            return x
        return jnp.where(real.reshape(real.shape + (1,) * (x.ndim - 2)), x, 0)

    return jax.tree.map(mask, tree)
