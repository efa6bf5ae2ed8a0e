"""The Pallas kernels of `causal_conv`, interpreted against float64 and lowered for the accelerators."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mlt_kernels import causal_conv, dispatch, pallas
from mlt_kernels.causal_conv.cases import Case, arguments
from mlt_kernels.testing import assert_close, cast_floating, check_isolation, cotangents, largest_array_in, value_and_grads

GPU, TPU = (importlib.import_module(f"mlt_kernels.causal_conv.pallas_{kind}") for kind in ("gpu", "tpu"))
CASES = {
    "halo": Case(B=2, T=45, D=5, W=4, bias=True, activation="silu", segments=True, halo=True),
    "widest": Case(B=2, T=33, D=3, W=8, bias=True, activation="silu", segments=True),
    "narrowest": Case(B=1, T=18, D=4, W=2),
    "blocks": Case(B=2, T=300, D=140, W=4, bias=True, activation="silu", segments=True, halo=True),
    "far": Case(B=1, T=140, D=4, W=5, dilation=20, activation="silu", segments=True, halo=True),
    "one_tap": Case(B=1, T=3, D=4, W=1, bias=True, activation="silu"),
}
"""Several pieces or blocks each, the last of them ragged; the widest kernel reaches over a whole piece, the far one over most of
a block."""
RUNS = [("pallas_gpu", name) for name in ("halo", "widest", "narrowest")]
RUNS += [("pallas_tpu", name) for name in ("halo", "blocks", "far", "one_tap")]


@pytest.fixture
def small_pieces(monkeypatch):
    """The interpreter compiles every unrolled token."""
    monkeypatch.setattr(GPU, "GROUP", 2)
    monkeypatch.setattr(GPU, "PIECE", 6)
    monkeypatch.setattr(TPU, "TOKENS", 128)
    monkeypatch.setattr(TPU, "CHANNELS", 128)


def split(case):
    """(function of the array arguments, array arguments)."""
    made = arguments(case)
    static = {name: made.pop(name) for name in ("activation", "dilation") if name in made}
    return functools.partial(causal_conv, **static, return_halo=case.W > 1), made


@functools.cache
def compiled(name, implementation):
    fn = functools.partial(split(CASES[name])[0], implementation=implementation)
    return fn, jax.jit(lambda args, cts: value_and_grads(fn, args, cotangent=cts))


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(("kernel", "name"), RUNS)
def test_values_gradients_and_isolation(kernel, name):
    fn, run = compiled(name, kernel)
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
@pytest.mark.parametrize("kernel", ["pallas_gpu", "pallas_tpu"])
def test_bfloat16(kernel):
    fn, args = split(CASES["halo"])
    low = cast_floating(args, jnp.bfloat16)
    cts = cotangents(jax.eval_shape(lambda args: fn(**args), low))
    with pallas.interpret():
        found = compiled("halo", kernel)[1](low, cts)
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


def test_refusals_on_a_tpu_say_why():
    x = jnp.ones((1, 4, 2))
    with pytest.raises(dispatch.UnsupportedError, match="planned for cpu"):
        causal_conv(x, jnp.ones((4, 2)), implementation="pallas_tpu")
    with pallas.interpret():
        with pytest.raises(dispatch.UnsupportedError, match=r"4 taps with dilation=43; .* 128 tokens"):
            causal_conv(x, jnp.ones((4, 2)), dilation=43, implementation="pallas_tpu")
        with pytest.raises(dispatch.UnsupportedError, match="17 taps"):
            causal_conv(x, jnp.ones((17, 2)), implementation="pallas_tpu")
        with pytest.raises(dispatch.UnsupportedError, match="float16"):
            causal_conv(x.astype(jnp.float16), jnp.ones((4, 2)), implementation="pallas_tpu")


DEVICES = {"pallas_gpu": ("cuda", "NVIDIA H200", "gpu", "triton"), "pallas_tpu": ("tpu", "TPU v5e", "tpu", "tpu_custom_call")}


@pytest.mark.parametrize("kernel", DEVICES)
def test_lowering_at_the_standard_shape(kernel):
    target, kind, platform, call = DEVICES[kernel]
    made, D = jax.ShapeDtypeStruct, 4096
    x = made((8, 4096, D), jnp.bfloat16)
    shapes = (x, made((4, D), jnp.float32), made((D,), jnp.float32), made(x.shape[:2], jnp.int32))

    def fn(x, kernel_WD, bias, segments):
        conv = functools.partial(causal_conv, activation="silu", segment_ids=segments, implementation=kernel)
        y, pullback = jax.vjp(lambda x, kernel_WD, bias: conv(x, kernel_WD, bias=bias), x, kernel_WD, bias)
        return y, pullback(x)

    with pallas.target_device(kind, platform=platform, cores=1 if platform == "tpu" else 132):
        text = jax.jit(fn).trace(*shapes).lower(lowering_platforms=(target,)).as_text()
        assert largest_array_in(fn, *shapes) == x.size
    assert text.count(call) >= 2
