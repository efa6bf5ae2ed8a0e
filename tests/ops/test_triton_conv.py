"""The Triton kernels of `causal_conv`: interpreted against float64 (TRITON_INTERPRET=1), lowered for a GPU without it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mlt_kernels import causal_conv, dispatch, triton_calls
from mlt_kernels.causal_conv.cases import TESTS, Case, arguments
from mlt_kernels.testing import assert_close, cast_floating, check_isolation, cotangents, largest_array_in, value_and_grads

CASES = TESTS | {
    "tiles": Case(B=1, T=300, D=70, W=4, bias=True, activation="silu", segments=True, halo=True),
    "far": Case(B=1, T=120, D=5, W=5, dilation=9, activation="silu", segments=True, halo=True),
}
"""`tiles` crosses every kind of tile border; `far` takes the tall tiles of long contexts."""


def split(case):
    """(function of the array arguments, array arguments)."""
    made = arguments(case)
    static = {name: made.pop(name) for name in ("activation", "dilation") if name in made}
    return functools.partial(causal_conv, **static, return_halo=True), made


def found(case, args, cts):
    fn = functools.partial(split(case)[0], implementation="triton_gpu")
    with triton_calls.interpret():
        return value_and_grads(fn, args, cotangent=cts)


def oracle(case, args, cts):
    fn = functools.partial(split(case)[0], implementation="reference")
    with jax.enable_x64(True):
        wide = cast_floating((args, cts), jnp.float64)
        return jax.tree.map(np.asarray, jax.jit(functools.partial(value_and_grads, fn))(wide[0], cotangent=wide[1]))


def cotangent(case, args):
    return cotangents(jax.eval_shape(lambda args: split(case)[0](**args, implementation="reference"), args))


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    case, (_, args) = CASES[name], split(CASES[name])
    cts = cotangent(case, args)
    assert_close(found(case, args, cts), oracle(case, args, cts), max_rel=1e-5, what=name)


@pytest.mark.usefixtures("triton_interpreter")
def test_rows_of_padding():
    case = CASES["packed"]
    args = split(case)[1] | {"segment_ids": jnp.zeros((case.B, case.T), jnp.int32)}
    cts = cotangent(case, args)
    assert_close(found(case, args, cts), oracle(case, args, cts), max_rel=1e-5)


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("name", ["packed", "far"])
def test_documents_are_isolated_to_the_bit(name):
    fn, args = split(CASES[name])
    segments = np.asarray(args["segment_ids"])
    compiled = functools.partial(found, CASES[name])
    fn = functools.partial(fn, implementation="reference")
    check_isolation(fn, args, segments, token_arguments=["x"], compiled=compiled)


@pytest.mark.usefixtures("triton_interpreter")
def test_bfloat16():
    case = dataclasses.replace(CASES["packed"], halo=True)
    low = cast_floating(split(case)[1], jnp.bfloat16)
    cts = cotangent(case, low)
    got = found(case, low, cts)
    assert got[0][0].dtype == got[1]["x"].dtype == got[1]["halo"].dtype == jnp.bfloat16
    assert_close(got, oracle(case, low, cts), max_rel=2e-2)


@pytest.mark.usefixtures("triton_compiler")
def test_lowering_at_the_standard_shape():
    made, D = jax.ShapeDtypeStruct, 4096
    x = made((8, 4096, D), jnp.bfloat16)
    shapes = (x, made((4, D), jnp.float32), made((D,), jnp.float32), made(x.shape[:2], jnp.int32))

    def fn(x, kernel, bias, segments):
        conv = functools.partial(causal_conv, activation="silu", segment_ids=segments, implementation="triton_gpu")
        y, pullback = jax.vjp(lambda x, kernel, bias: conv(x, kernel, bias=bias), x, kernel, bias)
        return y, pullback(x)

    with dispatch.target_platform("gpu"):
        text = jax.jit(fn).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
        assert largest_array_in(fn, *shapes) == x.size
    assert text.count("triton_kernel_call") == 2


@pytest.mark.usefixtures("triton_interpreter")
def test_refusals_say_why():
    x = jnp.ones((1, 4, 2))
    with triton_calls.interpret():
        with pytest.raises(dispatch.UnsupportedError, match="up to 64 tokens back"):
            causal_conv(x, jnp.ones((4, 2)), dilation=22, implementation="triton_gpu")
        with pytest.raises(dispatch.UnsupportedError, match="17 taps"):
            causal_conv(x, jnp.ones((17, 2)), implementation="triton_gpu")
