"""What the Triton backends share: reasons why they cannot run here, and no import of Triton before one does."""

import dataclasses
import functools
import importlib
import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import mlt_kernels
import pytest
from mlt_kernels import causal_conv, dispatch, triton_calls
from mlt_kernels.testing import value_and_grads

X, KERNEL = jnp.ones((1, 4, 2)), jnp.ones((2, 2))
OPS = [op for op in dispatch.ops() if "triton_gpu" in dispatch.backends(op)]


def test_a_cpu_is_no_gpu():
    with pytest.raises(
        dispatch.UnsupportedError, match=r"'triton_gpu' cannot run this call: its kernels are for gpu; planned for cpu"
    ):
        causal_conv(X, KERNEL, implementation="triton_gpu")


@pytest.mark.parametrize("missing", ["triton", "jax_triton"])
def test_a_missing_package_is_named(monkeypatch, missing):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else found(name) or object())
    with dispatch.target_platform("gpu"), pytest.raises(dispatch.UnsupportedError, match=f": {missing} not installed"):
        causal_conv(X, KERNEL, implementation="triton_gpu")


def test_a_process_that_interprets_does_not_compile(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with dispatch.target_platform("gpu"), pytest.raises(dispatch.UnsupportedError, match="TRITON_INTERPRET=1 is set"):
        causal_conv(X, KERNEL, implementation="triton_gpu")


def test_the_interpreter_is_asked_for_before_the_process_starts(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=None; expected '1'"), triton_calls.interpret():
        pass


@pytest.mark.parametrize("value", ["1", "true", "0"])
def test_kernels_and_triton_agree_on_who_interprets(value):
    """Whatever spelling switched it on: a product of bfloat16 tiles is another one there."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    code = """
import triton
from mlt_kernels import triton_calls
from mlt_kernels.linear_recurrence._triton_tiles import INTERPRETED
assert INTERPRETED.value == triton_calls.started_for_interpreter() == triton.knobs.runtime.interpret
"""
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"TRITON_INTERPRET": value}, check=True, timeout=120)


def split(op, name=None, **sizes):
    """(the op by Triton as a function of its arrays, arrays) of one of its test cases, the first unless named."""
    cases = importlib.import_module(f"mlt_kernels.{op}.cases")
    made = cases.arguments(dataclasses.replace(cases.TESTS[name or next(iter(cases.TESTS))], **sizes))
    arrays = {name: x for name, x in made.items() if hasattr(x, "dtype")}
    options = {name: x for name, x in made.items() if name not in arrays}
    return functools.partial(getattr(mlt_kernels, op), implementation="triton_gpu", **options), arrays


@pytest.mark.usefixtures("triton_compiler")
@pytest.mark.parametrize(("op", "name"), [*((op, None) for op in OPS), ("linear_recurrence", "gla")])
def test_a_row_of_one_token_lowers(op, name):
    """Triton makes a constant of every number that is 1, as the tokens or chunks of a row are here."""
    run, arrays = split(op, name, T=1)
    with dispatch.target_platform("gpu"):
        traced = jax.jit(lambda arrays: value_and_grads(run, arrays)).trace(arrays)
        assert traced.lower(lowering_platforms=("cuda",)).as_text().count("triton_kernel_call") >= 2


@pytest.mark.parametrize("op", OPS)
def test_more_rows_than_a_grid_holds_are_refused(op, monkeypatch):
    monkeypatch.setattr(triton_calls, "unsupported", lambda: None)
    run, arrays = split(op, B=11)

    def planned(rows):
        shapes = {name: (rows, *x.shape[1:]) if x.shape[0] == 11 else x.shape for name, x in arrays.items()}
        return {name: jax.ShapeDtypeStruct(shape, arrays[name].dtype) for name, shape in shapes.items()}

    with dispatch.target_platform("gpu"), pytest.raises(dispatch.UnsupportedError, match="has 65536 rows; a grid holds 65535"):
        jax.eval_shape(lambda args: run(**args), planned(65536))
    with dispatch.target_platform("gpu"), pytest.raises(dispatch.UnsupportedError, match="nothing to compute"):
        jax.eval_shape(lambda args: run(**args), planned(0))


def test_never_a_default():
    """Until it has run on a GPU."""
    assert OPS
    assert "triton_gpu" not in dispatch.PREFERENCE["gpu"]


def test_backends_import_without_triton():
    """In a process where any import of Triton fails."""
    code = f"""
import sys
sys.modules["triton"] = sys.modules["jax_triton"] = None
import mlt_kernels
from mlt_kernels import dispatch
for op in {OPS}:
    dispatch.load(op, "triton_gpu")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
