"""Row lookup against its float64 oracle, missing rows, and the rows that must never exist all at once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mlt_kernels import dispatch, testing
from mlt_kernels.row_lookup import row_lookup
from mlt_kernels.row_lookup.cases import TESTS, Case, arguments

evaluate = functools.partial(testing.evaluate, row_lookup)
oracle = functools.partial(testing.oracle, row_lookup)


@pytest.mark.parametrize("name", TESTS)
def test_values_and_gradients(name: str):
    given = arguments(TESTS[name])
    testing.assert_close(evaluate("chunked", given), oracle(given), max_rel=1e-5)


@pytest.mark.parametrize("name", ["crowded", "rows"])
def test_bfloat16(name: str):
    given = arguments(TESTS[name], dtype=jnp.bfloat16)
    testing.assert_close(evaluate("chunked", given), oracle(given), max_rel=2e-2)


def test_reference_against_a_loop():
    given = {name: np.asarray(x, np.float64 if x.dtype == jnp.float32 else None) for name, x in arguments(TESTS["odd"]).items()}
    want = np.zeros((2, 63, 19))
    for place in np.ndindex(2, 63, 5):
        if 0 <= given["indices"][place] < 37:
            want[place[:2]] += given["weights"][place] * given["table"][given["indices"][place]]
    testing.assert_close(row_lookup(**arguments(TESTS["odd"]), implementation="reference"), want, max_rel=1e-6)


def test_sums_are_float32_whatever_the_table():
    """1 + 4096 * 2 ** -10 = 5, which bfloat16 sums would never leave 1 to reach."""
    table = jnp.asarray([[1.0], [2.0**-10]], jnp.bfloat16)
    indices = jnp.asarray([[0] + [1] * 4096], jnp.int32)
    weights = jnp.ones(indices.shape, jnp.bfloat16)
    pooled = row_lookup(table, indices, weights)
    assert pooled.dtype == jnp.bfloat16
    assert float(pooled[0, 0]) == 5.0
    d_table = jax.grad(lambda table: row_lookup(table, indices.T, weights.T).astype(jnp.float32).sum())(table)
    assert d_table[:, 0].astype(jnp.float32).tolist() == [1.0, 4096.0]


def test_common_dtype():
    given = arguments(TESTS["odd"])
    assert row_lookup(given["table"].astype(jnp.bfloat16), given["indices"], given["weights"]).dtype == jnp.float32
    assert row_lookup(given["table"].astype(jnp.bfloat16), given["indices"]).dtype == jnp.bfloat16


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
@pytest.mark.parametrize("pooled", [True, False])
def test_missing_rows_give_nothing_and_get_nothing(implementation: str, pooled: bool):
    given = arguments(Case(M=4, D=3, tokens=(5,), K=2, pooled=pooled))
    given["indices"] = jnp.asarray([[-1, 4], [-4, 2**31 - 1], [-(2**31), 5], [-2, -3], [1, -1]], jnp.int32)
    value, gradients = evaluate(implementation, given)
    assert (np.asarray(value)[:4] == 0).all()
    assert (np.asarray(value)[4] != 0).any()
    assert (np.asarray(gradients["table"])[[0, 2, 3]] == 0).all()
    assert (np.asarray(gradients["table"])[1] != 0).all()
    if pooled:
        assert ((np.asarray(gradients["weights"]) != 0) == [[False] * 2] * 4 + [[True, False]]).all()


def test_tokens_are_isolated_to_the_bit():
    given = arguments(Case(M=20, D=12, tokens=(2, 64), K=6))
    segments = np.repeat(np.arange(1, 9), 8)[None].repeat(2, 0).astype(np.int32)
    fn = lambda weights: row_lookup(given["table"], given["indices"], weights)  # noqa: E731
    testing.check_isolation(fn, {"weights": given["weights"]}, segments, token_arguments=("weights",))


def test_the_gradient_by_slots_as_on_an_accelerator():
    """The table's gradient goes by slots where there is no CPU; the program itself is plain XLA."""
    given = arguments(TESTS["odd"])
    with dispatch.target_platform("gpu"):
        found = evaluate("chunked", given)
    testing.assert_close(found, oracle(given), max_rel=1e-5)


def test_the_rows_never_exist_all_at_once():
    M, D, T, K = 128, 32, 2048, 80
    given = arguments(Case(M=M, D=D, tokens=(2, T // 2), K=K))
    largest = testing.largest_array_in(lambda a: testing.value_and_grads(row_lookup, a), given)
    assert largest < T * K * D // 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": jnp.zeros(5)}, "table has shape"),
        ({"indices": jnp.zeros((), int)}, r"expected \(..., K\)"),
        ({"weights": jnp.zeros((2, 4))}, "expected that of indices"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str):
    given = {"table": jnp.zeros((6, 4)), "indices": jnp.zeros((2, 3), int)}
    with pytest.raises(ValueError, match=message):
        row_lookup(**(given | change))


def test_float_indices_are_refused():
    with pytest.raises(TypeError, match="indices has dtype float32; expected integer"):
        row_lookup(jnp.zeros((6, 4)), jnp.zeros((2, 3)))
