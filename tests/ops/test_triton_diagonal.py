"""The Triton kernels of `diagonal_recurrence`: interpreted against float64 (TRITON_INTERPRET=1), lowered for a GPU without it."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mlt_kernels import diagonal_recurrence, dispatch, triton_calls
from mlt_kernels.diagonal_recurrence.cases import TESTS, Case, arguments
from mlt_kernels.testing import assert_close, cast_floating, check_isolation, cotangents, largest_array_in, value_and_grads

KERNELS = importlib.import_module("mlt_kernels.diagonal_recurrence.triton_gpu")
CUT = Case(B=2, T=100, channels=(2, 3), segments=True, state=True)
CASES = TESTS | {
    "extreme reverse": dataclasses.replace(TESTS["reverse"], strongest=-60.0),
    "cut": CUT,
    "cut, extreme": dataclasses.replace(CUT, strongest=-60.0),
    "cut, complex reverse": dataclasses.replace(CUT, B=1, channels=(3,), is_complex=True, reverse=True),
}
"""Rows are cut into pieces of 64 and 36 tokens in those named so."""


@pytest.fixture
def small_tiles(monkeypatch, triton_interpreter):
    """The interpreter goes through a scan number by number."""
    monkeypatch.setattr(KERNELS, "CHANNELS", 8)
    monkeypatch.setattr(KERNELS, "SHORTEST_PIECE", 50)


def split(case):
    """(function of the array arguments that gives h and the final state, array arguments)."""
    made = arguments(case)
    return functools.partial(diagonal_recurrence, reverse=made.pop("reverse"), return_final_state=True), made


def found(case, args, cts):
    fn = functools.partial(split(case)[0], implementation="triton_gpu")
    with triton_calls.interpret():
        return jax.tree.map(np.asarray, value_and_grads(fn, args, cotangent=cts))


def oracle(case, args, cts):
    fn = functools.partial(split(case)[0], implementation="reference")
    with jax.enable_x64(True):
        wide = cast_floating((args, cts), jnp.float64)
        return jax.tree.map(np.asarray, jax.jit(functools.partial(value_and_grads, fn))(wide[0], cotangent=wide[1]))


def cotangent(case, args):
    return cotangents(jax.eval_shape(lambda args: split(case)[0](**args, implementation="reference"), args))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    case, (_, args) = CASES[name], split(CASES[name])
    cts = cotangent(case, args)
    assert_close(found(case, args, cts), oracle(case, args, cts), max_rel=1e-5, what=name)


@pytest.mark.usefixtures("small_tiles")
def test_rows_of_padding():
    args = split(CUT)[1]
    args["segment_ids"] = jnp.zeros_like(args["segment_ids"])
    cts = cotangent(CUT, args)
    assert_close(found(CUT, args, cts), oracle(CUT, args, cts), max_rel=1e-5)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", ["cut", "cut, complex reverse"])
def test_documents_are_isolated_to_the_bit(name):
    fn, args = split(CASES[name])
    fn = functools.partial(fn, implementation="reference")
    segments, compiled = np.asarray(args["segment_ids"]), functools.partial(found, CASES[name])
    check_isolation(fn, args, segments, token_arguments=["a", "b"], documents=[(0, 2)], compiled=compiled)


@pytest.mark.usefixtures("small_tiles")
def test_bfloat16_rows_keep_float32_states():
    case = TESTS["reverse"]
    low = cast_floating(split(case)[1], jnp.bfloat16)
    cts = cotangent(case, low)
    (h, final), grads = found(case, low, cts)
    assert (h.dtype, final.dtype, grads["a"].dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)
    assert_close(((h, final), grads), oracle(case, low, cts), max_rel=2e-2)


@pytest.mark.usefixtures("triton_compiler")
@pytest.mark.parametrize(
    ("shape", "dtype", "calls"), [((8, 4096), "bfloat16", 2), ((1, 131072), "bfloat16", 4), ((8, 64), "complex64", 2)]
)
def test_lowering(shape, dtype, calls):
    """The standard shape; one long row, cut into pieces; complex numbers."""
    rows = jax.ShapeDtypeStruct((*shape, 4096), dtype)

    def fn(a, b, segments):
        op = functools.partial(diagonal_recurrence, segment_ids=segments, implementation="triton_gpu")
        return value_and_grads(op, {"a": a, "b": b}, cotangent=a)

    with dispatch.target_platform("gpu"):
        args = (rows, rows, jax.ShapeDtypeStruct(shape, jnp.int32))
        text = jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
        assert largest_array_in(fn, *args) == rows.size
    assert text.count("triton_kernel_call") == calls


@pytest.mark.usefixtures("triton_interpreter")
def test_refusals_say_why():
    a = jnp.ones((1, 4, 0))
    with triton_calls.interpret(), pytest.raises(dispatch.UnsupportedError, match="nothing to compute"):
        diagonal_recurrence(a, a, implementation="triton_gpu")
