"""`causal_conv`: every implementation against the float64 oracle, boundaries to the bit, rows that go on in another row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mlt_kernels import causal_conv, dispatch
from mlt_kernels.causal_conv.cases import TESTS, arguments
from mlt_kernels.testing import assert_close, assert_same_bits, cast_floating, check_causality, check_isolation, value_and_grads

STATIC = ("activation", "dilation", "return_halo")
BACKENDS = tuple(name for name in dispatch.backends("causal_conv") if name in dispatch.PORTABLE)
"""The kernels of accelerators have their own test, `test_pallas_conv`."""


def split(case, **kwargs):
    """(function of the array arguments, array arguments)."""
    made = arguments(case, **kwargs)
    static = {name: made.pop(name) for name in STATIC if name in made}
    return functools.partial(causal_conv, **static), made


def oracle(case):
    with jax.enable_x64(True):
        fn, args = split(case)
        fn = functools.partial(fn, implementation="reference", return_halo=case.W > 1)
        return jax.tree.map(np.asarray, value_and_grads(fn, cast_floating(args, jnp.float64)))


@pytest.mark.parametrize("name", TESTS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "max_rel"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_values_and_gradients(backend, name, dtype, max_rel):
    case = TESTS[name]
    fn, args = split(case)
    fn = functools.partial(fn, implementation=backend, return_halo=case.W > 1)
    found = jax.jit(lambda args: value_and_grads(fn, args))(cast_floating(args, dtype))
    assert_close(found, oracle(case), max_rel=max_rel, what=name)


def test_sums_over_tokens_as_on_an_accelerator():
    """The gradients of kernel and bias are summed another way where there is no CPU; the program itself is plain XLA."""
    fn, args = split(TESTS["packed"])
    with dispatch.target_platform("gpu"):
        found = jax.jit(lambda args: value_and_grads(functools.partial(fn, implementation="chunked", return_halo=True), args))(
            args
        )
    assert_close(found, oracle(TESTS["packed"]), max_rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_are_isolated_to_the_bit(backend):
    for name in ("packed", "dilated"):
        fn, args = split(TESTS[name])
        fn = functools.partial(fn, implementation=backend)
        check_isolation(fn, args, np.asarray(args["segment_ids"]), token_arguments=["x"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_causal_to_the_bit(backend):
    fn, args = split(TESTS["packed"])
    check_causality(functools.partial(fn, implementation=backend), args, token_arguments=["x"], positions=(1, 30, 62))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", [1, 2, 5, 30])
def test_a_row_cut_in_two_goes_on(backend, cut):
    fn, args = split(TESTS["dilated"])
    fn = functools.partial(fn, implementation=backend, return_halo=True)
    whole, last = fn(**args)
    x, segments = args.pop("x"), args.pop("segment_ids")
    first, halo = fn(x=x[:, :cut], segment_ids=segments[:, :cut], **args)
    # The halo is of the first part's last document; where another one starts at the cut it must not be seen.
    goes_on = (segments[:, cut] == segments[:, cut - 1])[:, None, None]
    second, end = fn(x=x[:, cut:], segment_ids=segments[:, cut:], halo=jnp.where(goes_on, halo, 0), **args)
    assert_same_bits(jnp.concatenate([first, second], axis=1), whole)
    assert_same_bits(end, last)


def test_the_last_tap_reads_the_current_token():
    x = jnp.arange(1.0, 5.0).reshape(1, 4, 1)
    y = causal_conv(x, jnp.array([[100.0], [10.0], [1.0]]))
    np.testing.assert_array_equal(y.ravel(), [1, 12, 123, 234])


def test_wrong_arguments_are_named():
    x, kernel = jnp.zeros((2, 5, 3)), jnp.zeros((4, 3))
    with pytest.raises(ValueError, match=r"causal_conv: kernel has shape \(4, 2\)"):
        causal_conv(x, jnp.zeros((4, 2)))
    with pytest.raises(ValueError, match="activation"):
        causal_conv(x, kernel, activation="relu")
    with pytest.raises(ValueError, match="halo has shape"):
        causal_conv(x, kernel, halo=jnp.zeros((2, 4, 3)))
    with pytest.raises(TypeError, match="segment_ids"):
        causal_conv(x, kernel, segment_ids=jnp.zeros((2, 5)))
