"""Conformance helpers shared by the tests of every op and mixer: errors, gradients, segments, isolation, shapes."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

TOKEN_DIM = 1


def relative_error(actual: Any, expected: Any) -> float:
    """max |actual - expected| / max |expected| of one array; infinity if `actual` is not finite.

    Where `expected` is all zero, the largest |actual| itself.
    """
    actual = np.asarray(actual)
    expected = np.asarray(expected)
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {actual.shape}, expected {expected.shape}")
    if actual.size == 0:
        return 0.0
    wide = np.complex128 if np.iscomplexobj(expected) or np.iscomplexobj(actual) else np.float64
    actual, expected = actual.astype(wide), expected.astype(wide)
    if not np.isfinite(actual).all():
        return float("inf")
    error, size = np.abs(actual - expected).max(), np.abs(expected).max()
    return float(error / size if size > 0 else error)


def assert_close(actual: Any, expected: Any, *, max_rel: float, what: str = "") -> None:
    """Asserts `relative_error <= max_rel` for every leaf of two trees of the same structure."""
    expected_leaves, expected_tree = jax.tree.flatten_with_path(expected)
    actual_leaves, actual_tree = jax.tree.flatten_with_path(actual)
    assert actual_tree == expected_tree, f"{what}: tree {actual_tree}, expected {expected_tree}"
    for (path, want), (_, got) in zip(expected_leaves, actual_leaves, strict=True):
        error = relative_error(got, want)
        label = f"{what}{jax.tree_util.keystr(path)}"
        assert error <= max_rel, f"{label}: relative error {error:.3e} above {max_rel:.1e}"


def assert_same_bits(actual: Any, expected: Any, *, what: str = "") -> None:
    """Asserts that every leaf of two trees is equal to the last bit (NaN equals NaN; 0.0 equals -0.0)."""
    leaves = zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(actual), strict=True)
    for (path, want), got in leaves:
        got, want = np.asarray(got), np.asarray(want)
        label = f"{what}{jax.tree_util.keystr(path)}"
        assert got.dtype == want.dtype, f"{label}: {got.dtype}, expected {want.dtype}"
        assert got.shape == want.shape, f"{label}: {got.shape}, expected {want.shape}"
        same = (got == want) | ((got != got) & (want != want))
        assert same.all(), f"{label}: {int((~same).sum())} of {same.size} values differ"


def cast_floating(tree: Any, dtype: Any) -> Any:
    """Casts the real floating leaves of a tree to `dtype` (complex leaves to complex64 or complex128)."""
    wide = jnp.dtype(dtype).itemsize == 8

    def cast(x: Any) -> Any:
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            return x.astype(jnp.complex128 if wide else jnp.complex64)
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(cast, tree)


def cotangents(outputs: Any, seed: int = 0) -> Any:
    """Normal cotangents shaped like `outputs`, the same numbers whatever the dtype; zeros of float0 for integers."""
    leaves, tree = jax.tree.flatten(outputs)
    made = []
    for i, leaf in enumerate(leaves):
        rng = np.random.default_rng((seed, i))
        value = rng.standard_normal(leaf.shape)
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            value = value + 1j * rng.standard_normal(leaf.shape)
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            made.append(jnp.asarray(value, leaf.dtype))
        else:
            made.append(np.zeros(leaf.shape, jax.dtypes.float0))
    return jax.tree.unflatten(tree, made)


def differentiable(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the arguments that hold floating or complex arrays."""

    def is_float(x: Any) -> bool:
        return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)

    return tuple(name for name, value in arguments.items() if is_float(value))


def value_and_grads(
    fn: Callable[..., Any],
    arguments: Mapping[str, Any],
    *,
    wrt: Sequence[str] | None = None,
    cotangent: Any = None,
    seed: int = 0,
) -> tuple[Any, dict[str, Any]]:
    """`fn(**arguments)` and its gradients by argument name.

    Args:
      wrt: names to differentiate; by default every floating array argument.
      cotangent: of the result's structure; by default seeded normal numbers, equal for every dtype.
    """
    names = differentiable(arguments) if wrt is None else tuple(wrt)
    fixed = {name: value for name, value in arguments.items() if name not in names}
    result, pullback = jax.vjp(lambda diff: fn(**fixed, **diff), {name: arguments[name] for name in names})
    (grads,) = pullback(cotangents(result, seed) if cotangent is None else cotangent)
    return result, grads


def segment_ids(seed: int, batch: int, length: int, *, mean_document: float = 6.0, padding: bool = True) -> np.ndarray:
    """Random packed rows (B, T) int32: contiguous documents 1, 2, ..., some of one token, then padding 0."""
    rng = np.random.default_rng(seed)
    rows = np.zeros((batch, length), np.int32)
    for row in rows:
        end = length - int(rng.integers(0, max(1, length // 4))) if padding and length > 1 else length
        at, document = 0, 0
        while at < end:
            single = rng.random() < 0.25
            size = 1 if single else 1 + int(rng.exponential(mean_document))
            document += 1
            row[at : min(at + size, end)] = document
            at += size
    return rows


def positions(segments: np.ndarray) -> np.ndarray:
    """Positions (B, T) int32 that restart at 0 with each run of `segments`."""
    out = np.zeros(segments.shape, np.int32)
    for t in range(1, segments.shape[1]):
        out[:, t] = np.where(segments[:, t] == segments[:, t - 1], out[:, t - 1] + 1, 0)
    return out


def perturb_tokens(tree: Any, mask: np.ndarray, seed: int = 1) -> Any:
    """Replaces the floating leaves shaped (B, T, ...) by other values where `mask` (B, T) is set."""
    leaves, treedef = jax.tree.flatten(tree)
    changed = []
    for i, leaf in enumerate(leaves):
        if tuple(leaf.shape[:2]) == mask.shape and jnp.issubdtype(leaf.dtype, jnp.inexact):
            # A permutation of the row's own values keeps every argument inside its valid range.
            order = np.random.default_rng((seed, i)).permutation(leaf.shape[TOKEN_DIM])
            other = jnp.take(leaf, order, axis=TOKEN_DIM) * 0.75
            leaf = jnp.where(mask.reshape(mask.shape + (1,) * (leaf.ndim - 2)), other, leaf)
        changed.append(leaf)
    return jax.tree.unflatten(treedef, changed)


def check_isolation(
    fn: Callable[..., Any],
    arguments: Mapping[str, Any],
    segments: np.ndarray,
    *,
    token_arguments: Sequence[str],
    documents: Sequence[tuple[int, int]] | None = None,
    compiled: Callable[[Any, Any], tuple[Any, Any]] | None = None,
    seed: int = 0,
) -> None:
    """Asserts, to the bit, that changing one document changes nothing of any other.

    Replaces the token arguments and the output cotangents of one document; the outputs and the gradients of the
    token arguments at every other real token of all rows must keep every bit. Only leaves shaped (B, T, ...) count.

    Args:
      fn: takes `arguments` (segment ids inside, where it needs them).
      segments: (B, T), as in `arguments`.
      token_arguments: names of the arguments shaped (B, T, ...) that carry document content.
      documents: (row, segment id) pairs to perturb; by default the first, a middle and the last of each row.
      compiled: (arguments, cotangent) -> (result, gradients) of `fn`, where a test has it already.
    """
    grads_of = compiled or jax.jit(lambda args, cts: value_and_grads(fn, args, wrt=tuple(token_arguments), cotangent=cts))

    def of_tokens(tree: Any) -> list[np.ndarray]:
        return [np.asarray(leaf) for leaf in jax.tree.leaves(tree) if tuple(leaf.shape[:2]) == segments.shape]

    result_shape = jax.eval_shape(lambda args: fn(**args), dict(arguments))
    cts = cotangents(result_shape, seed)
    before = grads_of(dict(arguments), cts)
    if documents is None:
        documents = [(row, int(s)) for row in range(segments.shape[0]) for s in _sample(segments[row])]
    for row, segment in documents:
        inside = np.zeros(segments.shape, bool)
        inside[row] = segments[row] == segment
        assert inside.any(), f"row {row} has no document {segment}"
        changed = {**arguments}
        for name in token_arguments:
            changed[name] = perturb_tokens(arguments[name], inside, seed + 1)
        after = grads_of(changed, perturb_tokens(cts, inside, seed + 2))
        others = ~inside & (segments != 0)
        kept = [[leaf[others] for leaf in of_tokens(tree)] for tree in (after, before)]
        assert_same_bits(*kept, what=f"document {segment} of row {row} perturbed: ")
        moved, stayed = ([leaf[inside] for leaf in of_tokens(tree[0])] for tree in (after, before))
        assert any((a != b).any() for a, b in zip(moved, stayed, strict=True)), "the perturbation had no effect"


def check_causality(
    fn: Callable[..., Any],
    arguments: Mapping[str, Any],
    *,
    token_arguments: Sequence[str],
    positions: Sequence[int],
    compiled: Callable[[Any], Any] | None = None,
    seed: int = 0,
) -> None:
    """Asserts, to the bit, that outputs (B, T, ...) before t do not depend on the token arguments from t on.

    `compiled` takes the arguments and gives the outputs of `fn`, where a test has it already.
    """
    run = compiled or jax.jit(lambda args: fn(**args))
    before = run(dict(arguments))
    shape = arguments[token_arguments[0]].shape[:2]
    for t in positions:
        late = np.broadcast_to(np.arange(shape[1]) >= t, shape)
        changed = {**arguments}
        for name in token_arguments:
            changed[name] = perturb_tokens(arguments[name], late, seed + 1)
        after = run(changed)
        early = [jax.tree.map(lambda x: np.asarray(x)[:, :t], tree) for tree in (after, before)]  # noqa: B023
        assert_same_bits(*early, what=f"tokens from {t} on perturbed: ")


def evaluate(op: Callable[..., Any], implementation: str, arguments: Mapping[str, Any]) -> Any:
    """Result and gradients of a public op of the package, compiled; arguments that hold no array are static."""
    arrays = {name: x for name, x in arguments.items() if _holds_arrays(x)}
    fn = functools.partial(op, implementation=implementation, **{k: x for k, x in arguments.items() if k not in arrays})
    return jax.jit(lambda arrays: value_and_grads(fn, arrays))(arrays)


def oracle(op: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """The same of the op's reference in float64."""
    with jax.enable_x64(True):
        wide = {name: cast_floating(x, jnp.float64) if _holds_arrays(x) else x for name, x in arguments.items()}
        return jax.tree.map(np.asarray, evaluate(op, "reference", wide))


def _holds_arrays(x: Any) -> bool:
    return any(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(x))


def check_grouped_rows(fn: Callable[[Any, Any], Any], *, rows: int, groups: int, dims: tuple[int, int], dtype: Any) -> None:
    """Asserts, to the bit, that a row's output and gradient do not depend on other rows, group sizes or its place.

    Args:
      fn: takes rows (M, K) and group sizes (E,) and gives rows (M, N).
      rows, groups, dims: M, E and (K, N).
    """
    rng = np.random.default_rng(0)
    row, d_row = (rng.standard_normal(dim) for dim in dims)

    @jax.jit
    def run(x: Any, d_out: Any, sizes: Any) -> tuple[Any, Any]:
        out, pullback = jax.vjp(lambda x: fn(x, sizes), x)
        return out, pullback(d_out)[0]

    first = None
    for trial in range(10):
        sizes = rng.multinomial(int(rng.integers(1, rows + 1)), rng.dirichlet(np.full(groups, 0.5)))
        sizes[1] = max(1, sizes[1] - max(0, sizes.sum() - rows + 1))
        at = sizes[0] + (0 if trial == 0 else sizes[1] - 1 if trial == 1 else int(rng.integers(sizes[1])))
        x, d_out = rng.standard_normal((rows, dims[0])) * 10.0**trial, rng.standard_normal((rows, dims[1]))
        x[at], d_out[at] = row, d_row
        result = run(jnp.asarray(x, dtype), jnp.asarray(d_out, dtype), jnp.asarray(sizes, jnp.int32))
        found = [np.asarray(y[at], np.float32) for y in result]
        first = found if first is None else first
        assert_same_bits(found, first, what=f"trial {trial}: ")


def array_shapes_in(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> set[tuple[int, ...]]:
    """Shapes of every array in the jaxpr of `fn(*args, **kwargs)`, inner jaxprs included."""
    closed = jax.make_jaxpr(lambda a, k: fn(*a, **k))(args, kwargs)
    return {tuple(shape) for shape in _shapes(closed.jaxpr)}


def largest_array_in(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Number of elements of the largest array in the jaxpr of `fn(*args, **kwargs)`."""
    return max(int(np.prod(shape, dtype=np.int64)) for shape in array_shapes_in(fn, *args, **kwargs))


def _shapes(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    for var in (*jaxpr.invars, *jaxpr.constvars, *jaxpr.outvars):
        if hasattr(var.aval, "shape"):
            yield var.aval.shape
    for eqn in jaxpr.eqns:
        for var in (*eqn.invars, *eqn.outvars):
            if hasattr(var.aval, "shape"):
                yield var.aval.shape
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from _shapes(getattr(value, "jaxpr", value))


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")


def _sample(row: np.ndarray) -> list[int]:
    documents = [int(s) for s in np.unique(row) if s != 0]
    if not documents:
        return []
    return sorted({documents[0], documents[len(documents) // 2], documents[-1]})
