"""`selective_scan`: both portable forms against the float64 oracle, boundaries to the bit, states, and what is never stored."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compile_options import FUSED
from mlt_kernels import dispatch, selective_scan
from mlt_kernels.selective_scan.cases import TESTS, Case, arguments
from mlt_kernels.testing import (
    assert_close,
    cast_floating,
    check_causality,
    check_isolation,
    cotangents,
    largest_array_in,
    value_and_grads,
)

PLATFORMS = ("cpu", "gpu")
"""The portable form scans tokens on a CPU and by association elsewhere; both run here."""
PACKED = ("packed", "extreme", "padding")
TOKEN_ARGUMENTS = ["x", "step", "B", "C"]
scan = functools.partial(selective_scan, return_final_state=True)
chunked = functools.partial(scan, implementation="chunked")


@functools.cache
def compiled(platform):
    """(arguments, cotangents) -> (results, gradients), compiled once a shape."""
    del platform  # a key of the cache: the portable form of one platform must not serve another
    return jax.jit(lambda args, cts: value_and_grads(chunked, args, cotangent=cts))


def run(platform, args, cts=None):
    if cts is None:
        cts = cotangents(jax.eval_shape(lambda args: chunked(**args), args))
    with dispatch.target_platform(platform):
        return compiled(platform)(args, cts)


reference = jax.jit(lambda args: value_and_grads(functools.partial(scan, implementation="reference"), args))


def oracle(args):
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, reference(cast_floating(args, jnp.float64)))


@pytest.mark.parametrize(("platform", "name"), [*(("cpu", name) for name in TESTS), *(("gpu", name) for name in PACKED)])
def test_values_and_gradients(platform, name):
    args = arguments(TESTS[name])
    assert_close(run(platform, args), oracle(args), max_rel=1e-5, what=name)


def test_bfloat16_inputs_keep_float32_states():
    low = cast_floating(arguments(TESTS["packed"]), jnp.bfloat16)
    found = run("cpu", low)
    assert found[0][0].dtype == jnp.bfloat16
    assert found[0][1].dtype == jnp.float32
    assert_close(found, oracle(low), max_rel=1e-2)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_documents_are_isolated_to_the_bit(platform):
    args = arguments(TESTS["packed"])
    segments = np.asarray(args["segment_ids"])
    call = functools.partial(run, platform)
    check_isolation(chunked, args, segments, token_arguments=TOKEN_ARGUMENTS, compiled=call)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_causal_to_the_bit(platform):
    args = arguments(TESTS["packed"])
    outputs = lambda args: run(platform, args)[0][0]  # noqa: E731
    check_causality(chunked, args, token_arguments=TOKEN_ARGUMENTS, positions=(1, 63, 64, 129), compiled=outputs)


def test_a_state_goes_on():
    args = arguments(TESTS["plain"])
    tokens = {name: args.pop(name) for name in TOKEN_ARGUMENTS}
    fn = jax.jit(lambda tokens, state: chunked(**tokens, **args, initial_state=state))
    zero = jnp.zeros((2, 5, 4))
    whole, last = fn(tokens, zero)
    first, state = fn({n: v[:, :20] for n, v in tokens.items()}, zero)
    second, end = fn({n: v[:, 20:] for n, v in tokens.items()}, state)
    assert_close(jnp.concatenate([first, second], axis=1), whole, max_rel=1e-6)
    assert_close(end, last, max_rel=1e-6)


def test_padding_keeps_the_state_and_takes_no_gradient():
    args = arguments(TESTS["padding"])
    (y, final), grads = run("cpu", args)
    assert not np.asarray(y).any()
    np.testing.assert_array_equal(final, args["initial_state"])
    assert not any(np.asarray(grads[name]).any() for name in (*TOKEN_ARGUMENTS, "A", "skip"))


def test_no_array_holds_every_state():
    case = Case(B=1, T=1024, D=128, N=16, skip=True, segments=True, state=True)
    args = arguments(case)
    every_state = case.T * case.D * case.N
    assert largest_array_in(lambda args: value_and_grads(chunked, args), args) <= every_state // case.N


def test_memory_grows_by_tokens_not_by_states():
    def temporary(T):
        args = arguments(Case(B=1, T=T, D=128, N=16, segments=True))
        return jax.jit(lambda a: value_and_grads(chunked, a)).lower(args).compile(FUSED).memory_analysis().temp_size_in_bytes

    # Two arrays of (T, D), the border states and y in float32, and one float32 state every 64 tokens at most.
    assert temporary(2048) - temporary(1024) <= 3 * 1024 * 128 * 4


def test_wrong_arguments_are_named():
    args = arguments(TESTS["one_token"])
    with pytest.raises(ValueError, match="selective_scan: B has shape"):
        selective_scan(**{**args, "B": args["B"][:, :, 1:]})
    with pytest.raises(ValueError, match="initial_state has shape"):
        selective_scan(**{**args, "initial_state": args["initial_state"][:1]})
    with pytest.raises(TypeError, match="A has dtype"):
        selective_scan(**{**args, "A": args["A"].astype(complex)})
