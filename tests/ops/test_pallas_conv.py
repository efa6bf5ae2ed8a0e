"""The GPU kernels of `causal_conv`, interpreted against float64 and lowered for a GPU."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mlt_kernels import causal_conv, dispatch, pallas
from mlt_kernels.causal_conv.cases import Case, arguments
from mlt_kernels.testing import assert_close, cast_floating, check_isolation, cotangents, largest_array_in, value_and_grads

KERNELS = importlib.import_module("mlt_kernels.causal_conv.pallas_gpu")
CASES = {
    "halo": Case(B=2, T=45, D=5, W=4, bias=True, activation="silu", segments=True, halo=True),
    "widest": Case(B=2, T=33, D=3, W=8, bias=True, activation="silu", segments=True),
    "narrowest": Case(B=1, T=18, D=4, W=2),
}
"""Several pieces each, the last of them ragged; the widest kernel reaches over a whole piece."""


@pytest.fixture
def small_pieces(monkeypatch):
    """The interpreter compiles every unrolled token."""
    monkeypatch.setattr(KERNELS, "GROUP", 2)
    monkeypatch.setattr(KERNELS, "PIECE", 6)


def split(case):
    """(function of the array arguments, array arguments)."""
    made = arguments(case)
    static = {name: made.pop(name) for name in ("activation", "dilation") if name in made}
    return functools.partial(causal_conv, **static, return_halo=True), made


@functools.cache
def compiled(name, implementation):
    fn = functools.partial(split(CASES[name])[0], implementation=implementation)
    return fn, jax.jit(lambda args, cts: value_and_grads(fn, args, cotangent=cts))


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("name", CASES)
def test_values_gradients_and_isolation(name):
    fn, run = compiled(name, "pallas_gpu")
    packed = split(CASES[name])[1]
    datasets = [packed]
    if "segment_ids" in packed:
        datasets.append({**packed, "segment_ids": jnp.zeros_like(packed["segment_ids"])})
    with pallas.interpret():
        cts = cotangents(jax.eval_shape(lambda args: fn(**args), packed))
        for args in datasets:
            with jax.enable_x64(True):
                wide = cast_floating((args, cts), jnp.float64)
                expected = jax.tree.map(np.asarray, compiled(name, "reference")[1](*wide))
            assert_close(run(args, cts), expected, max_rel=1e-5, what=name)
        if "segment_ids" in packed:
            check_isolation(fn, packed, np.asarray(packed["segment_ids"]), token_arguments=["x"], compiled=run)


@pytest.mark.usefixtures("small_pieces")
def test_bfloat16():
    fn, args = split(CASES["halo"])
    low = cast_floating(args, jnp.bfloat16)
    cts = cotangents(jax.eval_shape(lambda args: fn(**args), low))
    with pallas.interpret():
        found = compiled("halo", "pallas_gpu")[1](low, cts)
    with jax.enable_x64(True):
        expected = jax.tree.map(np.asarray, compiled("halo", "reference")[1](*cast_floating((low, cts), jnp.float64)))
    assert found[0][0].dtype == jnp.bfloat16
    assert_close(found, expected, max_rel=2e-2)


def test_refusals_say_why():
    x = jnp.ones((1, 4, 2))
    with pytest.raises(dispatch.UnsupportedError, match="planned for cpu"):
        causal_conv(x, jnp.ones((4, 2)), implementation="pallas_gpu")
    with pallas.interpret():
        with pytest.raises(dispatch.UnsupportedError, match="dilation=2"):
            causal_conv(x, jnp.ones((4, 2)), dilation=2, implementation="pallas_gpu")
        with pytest.raises(dispatch.UnsupportedError, match="9 taps"):
            causal_conv(x, jnp.ones((9, 2)), implementation="pallas_gpu")


def test_lowering_at_the_standard_shape():
    made, D = jax.ShapeDtypeStruct, 4096
    x = made((8, 4096, D), jnp.bfloat16)
    shapes = (x, made((4, D), jnp.float32), made((D,), jnp.float32), made(x.shape[:2], jnp.int32))

    def fn(x, kernel, bias, segments):
        conv = functools.partial(causal_conv, activation="silu", segment_ids=segments, implementation="pallas_gpu")
        y, pullback = jax.vjp(lambda x, kernel, bias: conv(x, kernel, bias=bias), x, kernel, bias)
        return y, pullback(x)

    with pallas.target_device():
        text = jax.jit(fn).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
        assert largest_array_in(fn, *shapes) == x.size
    assert text.count("triton") >= 2
