"""Grouped SwiGLUs against their float64 oracle, the isolation of rows to the bit, and what is never made."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mlt_kernels import dispatch, grouped_matmul, testing
from mlt_kernels.grouped_swiglu import grouped_swiglu
from mlt_kernels.grouped_swiglu.cases import TESTS, Case, arguments

evaluate = functools.partial(testing.evaluate, grouped_swiglu)
oracle = functools.partial(testing.oracle, grouped_swiglu)


@pytest.mark.parametrize("name", TESTS)
def test_values_and_gradients(name: str):
    given = arguments(TESTS[name])
    testing.assert_close(evaluate("chunked", given), oracle(given), max_rel=1e-5)


def test_bfloat16():
    given = arguments(TESTS["long_groups"], dtype=jnp.bfloat16)
    testing.assert_close(evaluate("chunked", given), oracle(given), max_rel=2e-2)


def test_is_what_three_products_are():
    given = arguments(TESTS["empty_groups"])
    x, gate, up, down, sizes = (given[name] for name in ("x", "gate", "up", "down", "group_sizes"))
    hidden = jax.nn.silu(grouped_matmul(x, gate, sizes)) * grouped_matmul(x, up, sizes)
    testing.assert_close(grouped_swiglu(**given), grouped_matmul(hidden, down, sizes), max_rel=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("M", "E", "D", "F"), [(150, 3, 63, 100), (40, 8, 5, 1), (700, 2, 64, 96)])
def test_a_row_depends_on_no_other(dtype: Any, M: int, E: int, D: int, F: int):
    """The same row and cotangent, among other rows, other group sizes and at other places, in long blocks and short ones."""
    case = arguments(Case(M=M, E=E, D=D, F=F), dtype=dtype)
    weights = [case[name] for name in ("gate", "up", "down")]
    testing.check_grouped_rows(lambda x, sizes: grouped_swiglu(x, *weights, sizes), rows=M, groups=E, dims=(D, D), dtype=dtype)


def test_rows_of_no_group_may_hold_anything():
    given = arguments(TESTS["long_groups"])
    rows = int(given["group_sizes"].sum())
    junk = given | {"x": given["x"].at[rows:].set(jnp.nan)}
    clean, poisoned = evaluate("chunked", given), evaluate("chunked", junk)
    testing.assert_same_bits(poisoned, clean)
    assert (np.asarray(clean[0])[rows:] == 0).all()
    assert (np.asarray(clean[1]["x"])[rows:] == 0).all()


def test_what_is_made():
    """No weight per row or block, nor every row for every group; without a gradient no hidden units of all rows."""
    M, E, D, F = 4096, 4, 16, 80
    given = arguments(Case(M=M, E=E, D=D, F=F))
    assert testing.largest_array_in(lambda a: grouped_swiglu(**a), given) <= M * D
    assert testing.largest_array_in(lambda a: testing.value_and_grads(grouped_swiglu, a), given) <= M * F


def test_a_policy_may_keep_what_is_named():
    """Kept, the products are not computed again: the loop of the forward pass stands once, not twice."""
    given = arguments(TESTS["empty_groups"])

    def loops(*names: str) -> int:
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        once = lambda x: grouped_swiglu(**(given | {"x": x}), hidden_name="hidden")  # noqa: E731
        fn = lambda x: jnp.sum(jax.checkpoint(once, policy=policy)(x))  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(fn))(given["x"])).count("scan[")

    assert loops("hidden") == loops() - 1


def test_other_backends_are_three_products():
    given = arguments(TESTS["long_groups"])
    with pytest.raises(dispatch.UnsupportedError, match="every group for every row"):
        grouped_swiglu(**given, implementation="ragged_dot")
    with dispatch.target_platform("gpu"):
        traced = jax.jit(lambda a: grouped_swiglu(**a, implementation="ragged_dot", hidden_name="hidden")).trace(given)
        assert "name=hidden" in str(traced.jaxpr)
        assert str(traced.jaxpr).count("ragged_dot_general[") == 3
        assert "ragged_dot" in traced.lower(lowering_platforms=("cuda",)).as_text()
        # Its numbers, on this platform's slow path.
        testing.assert_close(evaluate("ragged_dot", given), oracle(given), max_rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"up": jnp.zeros((2, 4, 5))}, "up has shape .* F=3 from gate"),
        ({"down": jnp.zeros((2, 4, 3))}, "down has shape"),
        ({"group_sizes": jnp.zeros(3, int)}, "group_sizes has shape"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str):
    given = {"x": jnp.zeros((6, 4)), "gate": jnp.zeros((2, 4, 3)), "up": jnp.zeros((2, 4, 3)), "down": jnp.zeros((2, 3, 4))}
    with pytest.raises(ValueError, match=message):
        grouped_swiglu(**({**given, "group_sizes": jnp.zeros(2, int)} | change))
