"""`diagonal_recurrence`: both portable forms against the float64 oracle, boundaries to the bit, states that go on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mlt_kernels import diagonal_recurrence, dispatch
from mlt_kernels.diagonal_recurrence.cases import TESTS, arguments
from mlt_kernels.testing import assert_close, cast_floating, check_causality, check_isolation, value_and_grads

PLATFORMS = ("cpu", "gpu")
"""The portable form scans tokens on a CPU and chunks elsewhere; both run here. Kernels: `test_pallas_diagonal`."""
chunked = functools.partial(diagonal_recurrence, implementation="chunked")


def split(case, **kwargs):
    """(function of the array arguments, array arguments)."""
    made = arguments(case, **kwargs)
    reverse = made.pop("reverse")
    return functools.partial(chunked, reverse=reverse, return_final_state=True), made


@functools.cache
def oracle(name):
    with jax.enable_x64(True):
        fn, args = split(TESTS[name])
        fn = functools.partial(fn, implementation="reference")
        return jax.tree.map(np.asarray, value_and_grads(fn, cast_floating(args, jnp.float64)))


@pytest.mark.parametrize("name", TESTS)
@pytest.mark.parametrize("platform", PLATFORMS)
def test_values_and_gradients(platform, name):
    fn, args = split(TESTS[name])
    with dispatch.target_platform(platform):
        found = jax.jit(lambda args: value_and_grads(fn, args))(args)
    assert_close(found, oracle(name), max_rel=1e-5, what=name)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_bfloat16(platform):
    fn, args = split(TESTS["packed"])
    low = cast_floating(args, jnp.bfloat16)
    with dispatch.target_platform(platform):
        found = jax.jit(lambda args: value_and_grads(fn, args))(low)
    with jax.enable_x64(True):
        wide = cast_floating(low, jnp.float64)
        expected = value_and_grads(functools.partial(fn, implementation="reference"), wide)
    assert_close(found, jax.tree.map(np.asarray, expected), max_rel=2e-2)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", ["packed", "reverse", "extreme"])
def test_documents_are_isolated_to_the_bit(platform, name):
    fn, args = split(TESTS[name])
    args.pop("initial_state", None)
    run = functools.partial(fn, return_final_state=False)
    with dispatch.target_platform(platform):
        check_isolation(run, args, np.asarray(args["segment_ids"]), token_arguments=["a", "b"])


@pytest.mark.parametrize("platform", PLATFORMS)
def test_causal_to_the_bit(platform):
    fn, args = split(TESTS["packed"])
    run = functools.partial(fn, return_final_state=False)
    with dispatch.target_platform(platform):
        check_causality(run, args, token_arguments=["a", "b"], positions=(1, 63, 64, 129))


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_state_goes_on(platform):
    a, b = (arguments(TESTS["plain"])[name] for name in ("a", "b"))
    with dispatch.target_platform(platform):
        whole, last = chunked(a, b, return_final_state=True)
        first, state = chunked(a[:, :20], b[:, :20], return_final_state=True)
        second, end = chunked(a[:, 20:], b[:, 20:], initial_state=state, return_final_state=True)
    assert_close(jnp.concatenate([first, second], axis=1), whole, max_rel=1e-6)
    assert_close(end, last, max_rel=1e-6)


def test_padding_keeps_the_state():
    a, b = (arguments(TESTS["plain"])[name] for name in ("a", "b"))
    segments = jnp.asarray(np.r_[np.ones(40), np.zeros(23)].astype(np.int32))[None].repeat(2, 0)
    _, padded = diagonal_recurrence(a, b, segment_ids=segments, return_final_state=True)
    _, short = diagonal_recurrence(a[:, :40], b[:, :40], return_final_state=True)
    assert_close(padded, short, max_rel=1e-6)


def test_wrong_arguments_are_named():
    a = jnp.zeros((2, 5, 3))
    with pytest.raises(ValueError, match="b has shape"):
        diagonal_recurrence(a, a[:, :4])
    with pytest.raises(ValueError, match="initial_state has shape"):
        diagonal_recurrence(a, a, initial_state=jnp.zeros((2, 4)))
    with pytest.raises(TypeError, match="a has dtype"):
        diagonal_recurrence(a.astype(int), a)
