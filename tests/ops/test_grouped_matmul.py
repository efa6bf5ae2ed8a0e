"""Grouped matmul against its float64 oracle, and the isolation of rows to the bit."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mlt_kernels import dispatch, testing
from mlt_kernels.grouped_matmul import grouped_matmul
from mlt_kernels.grouped_matmul.cases import TESTS, Case, arguments

evaluate = functools.partial(testing.evaluate, grouped_matmul)
oracle = functools.partial(testing.oracle, grouped_matmul)


@pytest.mark.parametrize("name", TESTS)
def test_values_and_gradients(name: str):
    given = arguments(TESTS[name])
    testing.assert_close(evaluate("chunked", given), oracle(given), max_rel=1e-5)


def test_bfloat16():
    given = arguments(TESTS["odd"], dtype=jnp.bfloat16)
    testing.assert_close(evaluate("chunked", given), oracle(given), max_rel=2e-2)


def test_reference_against_a_loop_over_rows():
    given = arguments(TESTS["empty_groups"])
    lhs, rhs, sizes = (np.asarray(given[name]) for name in ("lhs", "rhs", "group_sizes"))
    want = np.zeros((90, 33))
    for row, expert in enumerate(np.repeat(np.arange(6), sizes)):
        want[row] = lhs[row].astype(np.float64) @ rhs[expert]
    testing.assert_close(grouped_matmul(**given, implementation="reference"), want, max_rel=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("M", "E", "K", "N"), [(150, 3, 63, 100), (150, 3, 100, 63), (40, 8, 5, 1), (40, 8, 1, 17), (520, 4, 256, 384)]
)
def test_a_row_depends_on_no_other(dtype: Any, M: int, E: int, K: int, N: int):
    """The same row and cotangent, among other rows, other group sizes and at other places: the same bits."""
    rhs = jnp.asarray(np.random.default_rng(1).standard_normal((E, K, N)), dtype)
    testing.check_grouped_rows(lambda x, sizes: grouped_matmul(x, rhs, sizes), rows=M, groups=E, dims=(K, N), dtype=dtype)


def test_rows_of_no_group_may_hold_anything():
    given = arguments(TESTS["odd"])
    rows = int(given["group_sizes"].sum())
    junk = given | {"lhs": given["lhs"].at[rows:].set(jnp.nan)}
    clean, poisoned = evaluate("chunked", given), evaluate("chunked", junk)
    testing.assert_same_bits(poisoned, clean)
    assert (np.asarray(clean[0])[rows:] == 0).all()
    assert (np.asarray(clean[1]["lhs"])[rows:] == 0).all()


def test_work_does_not_grow_with_the_groups():
    """No array holds a weight per row or per block, or every row for every group."""
    M, E, K, N = 512, 64, 32, 48
    given = arguments(Case(M=M, E=E, K=K, N=N))
    largest = testing.largest_array_in(lambda a: testing.value_and_grads(grouped_matmul, a), given)
    assert largest <= E * K * N


def test_ragged_dot_says_why_not_on_a_cpu():
    given = arguments(TESTS["odd"])
    with pytest.raises(dispatch.UnsupportedError, match="every group for every row"):
        grouped_matmul(**given, implementation="ragged_dot")
    with dispatch.target_platform("gpu"):
        traced = jax.jit(lambda a: evaluate("ragged_dot", a)).trace(given)
        assert "ragged_dot" in traced.lower(lowering_platforms=("cuda",)).as_text()
        # Its numbers, on this platform's slow path.
        testing.assert_close(evaluate("ragged_dot", given), oracle(given), max_rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rhs": jnp.zeros((2, 5, 3))}, "rhs has shape .* with K=4 from lhs"),
        ({"group_sizes": jnp.zeros(3, int)}, "group_sizes has shape"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str):
    given = {"lhs": jnp.zeros((6, 4)), "rhs": jnp.zeros((2, 4, 3)), "group_sizes": jnp.zeros(2, int)}
    with pytest.raises(ValueError, match=message):
        grouped_matmul(**(given | change))
