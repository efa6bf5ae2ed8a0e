"""Products with rows of a table against their float64 oracle, missing rows, and the rows that must never exist at once."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from mlt_kernels import testing
from mlt_kernels.row_dot import row_dot
from mlt_kernels.row_dot.cases import TESTS, Case, arguments

evaluate = functools.partial(testing.evaluate, row_dot)
oracle = functools.partial(testing.oracle, row_dot)


@pytest.mark.parametrize("name", TESTS)
def test_values_and_gradients(name: str):
    given = arguments(TESTS[name])
    testing.assert_close(evaluate("chunked", given), oracle(given), max_rel=1e-5)


def test_bfloat16():
    given = arguments(TESTS["odd"], dtype=jnp.bfloat16)
    found = evaluate("chunked", given)
    assert found[0].dtype == jnp.float32
    testing.assert_close(found, oracle(given), max_rel=2e-2)


def test_reference_against_a_loop():
    given = {name: np.asarray(x, np.float64 if x.dtype == jnp.float32 else None) for name, x in arguments(TESTS["odd"]).items()}
    want = np.zeros((2, 63, 5))
    for place in np.ndindex(2, 63, 5):
        if 0 <= given["indices"][place] < 37:
            want[place] = given["table"][given["indices"][place]] @ given["x"][place[:2]]
    testing.assert_close(row_dot(**arguments(TESTS["odd"]), implementation="reference"), want, max_rel=1e-6)


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
def test_missing_rows_give_nothing_and_get_nothing(implementation: str):
    given = arguments(Case(M=4, D=3, tokens=(5,), K=2))
    given["indices"] = jnp.asarray([[-1, 4], [-4, 2**31 - 1], [-(2**31), 5], [-2, -3], [1, -1]], jnp.int32)
    value, gradients = evaluate(implementation, given)
    assert ((np.asarray(value) != 0) == [[False] * 2] * 4 + [[True, False]]).all()
    assert (np.asarray(gradients["table"])[[0, 2, 3]] == 0).all()
    assert (np.asarray(gradients["table"])[1] != 0).all()
    assert (np.asarray(gradients["x"])[:4] == 0).all()


def test_tokens_are_isolated_to_the_bit():
    given = arguments(Case(M=20, D=12, tokens=(2, 64), K=6))
    segments = np.repeat(np.arange(1, 9), 8)[None].repeat(2, 0).astype(np.int32)
    fn = lambda x: row_dot(given["table"], given["indices"], x)  # noqa: E731
    testing.check_isolation(fn, {"x": given["x"]}, segments, token_arguments=("x",))


def test_the_rows_never_exist_all_at_once():
    M, D, T, K = 128, 32, 2048, 80
    given = arguments(Case(M=M, D=D, tokens=(2, T // 2), K=K))
    largest = testing.largest_array_in(lambda a: testing.value_and_grads(row_dot, a), given)
    assert largest < T * K * D // 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": jnp.zeros(5)}, "table has shape"),
        ({"indices": jnp.zeros((), int)}, r"expected \(..., K\)"),
        ({"x": jnp.zeros((2, 5))}, r"expected \(2, 4\)"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str):
    given = {"table": jnp.zeros((6, 4)), "indices": jnp.zeros((2, 3), int), "x": jnp.zeros((2, 4))}
    with pytest.raises(ValueError, match=message):
        row_dot(**(given | change))
