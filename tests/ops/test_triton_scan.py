"""The Triton kernels of `selective_scan`: interpreted against float64 (TRITON_INTERPRET=1), lowered for a GPU without it."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mlt_kernels import dispatch, selective_scan, triton_calls
from mlt_kernels.selective_scan.cases import TESTS, Case, arguments
from mlt_kernels.testing import assert_close, cast_floating, check_isolation, cotangents, largest_array_in, value_and_grads

KERNELS = importlib.import_module("mlt_kernels.selective_scan.triton_gpu")
SCAN = functools.partial(selective_scan, return_final_state=True)
CASES = TESTS | {"whole chunks": Case(B=1, T=128, D=4, N=2, skip=True), "wide": Case(B=1, T=5, D=9, N=33, segments=True)}


@pytest.fixture
def narrow(monkeypatch, triton_interpreter):
    """Several programs a row, the last of them not full."""
    monkeypatch.setattr(KERNELS, "CHANNELS", {64: 8})
    monkeypatch.setattr(KERNELS, "BACKWARD_CHANNELS", 4)


def found(args, cts):
    with triton_calls.interpret():
        run = functools.partial(SCAN, implementation="triton_gpu")
        return jax.tree.map(np.asarray, value_and_grads(run, args, cotangent=cts))


def oracle(args, cts):
    run = functools.partial(SCAN, implementation="reference")
    with jax.enable_x64(True):
        wide = cast_floating((args, cts), jnp.float64)
        return jax.tree.map(np.asarray, jax.jit(functools.partial(value_and_grads, run))(wide[0], cotangent=wide[1]))


def cotangent(args):
    return cotangents(jax.eval_shape(lambda args: SCAN(**args, implementation="reference"), args))


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    args = arguments(CASES[name])
    cts = cotangent(args)
    assert_close(found(args, cts), oracle(args, cts), max_rel=1e-5, what=name)


@pytest.mark.usefixtures("narrow")
def test_documents_are_isolated_to_the_bit():
    args = arguments(TESTS["packed"])
    check_isolation(
        functools.partial(SCAN, implementation="reference"),
        args,
        np.asarray(args["segment_ids"]),
        token_arguments=["x", "step", "B", "C"],
        documents=[(0, 2), (1, 5)],
        compiled=found,
    )


@pytest.mark.usefixtures("narrow")
def test_bfloat16_rows_keep_float32_states():
    low = cast_floating(arguments(CASES["whole chunks"]), jnp.bfloat16)
    cts = cotangent(low)
    (y, final), grads = found(low, cts)
    assert (y.dtype, final.dtype, grads["x"].dtype, grads["A"].dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16, jnp.bfloat16)
    assert_close(((y, final), grads), oracle(low, cts), max_rel=1e-2)


@pytest.mark.usefixtures("triton_compiler")
@pytest.mark.parametrize("case", [Case(B=2, T=2048, D=4096, N=16, skip=True, segments=True), Case(B=1, T=100, D=7, N=3)])
def test_lowering(case):
    """One call each way, and nothing as large as a state for every token of one channel block."""
    one = dataclasses.replace(case, B=1, T=1, D=1, N=1)
    shapes = arguments(one, dtype=jnp.bfloat16)
    sizes = {"x": "BTD", "step": "BTD", "A": "DN", "B": "BTN", "C": "BTN", "skip": "D", "segment_ids": "BT"}
    args = {
        name: jax.ShapeDtypeStruct(tuple(getattr(case, letter) for letter in sizes[name]), value.dtype)
        for name, value in shapes.items()
    }

    def fn(args):
        run = functools.partial(selective_scan, implementation="triton_gpu")
        return value_and_grads(run, args, cotangent=jnp.zeros_like(args["x"]))

    with dispatch.target_platform("gpu"):
        text = jax.jit(fn).trace(args).lower(lowering_platforms=("cuda",)).as_text()
        if case.D > 32:
            assert largest_array_in(fn, args) <= case.B * case.T * case.D * case.N // 16
    assert text.count("triton_kernel_call") == 2


@pytest.mark.usefixtures("triton_interpreter")
def test_refusals_say_why():
    args = arguments(Case(B=1, T=3, D=2, N=65))
    with triton_calls.interpret(), pytest.raises(dispatch.UnsupportedError, match=r"65 states a channel; .* at most 64"):
        selective_scan(**args, implementation="triton_gpu")
