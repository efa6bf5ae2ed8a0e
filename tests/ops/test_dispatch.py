"""Choosing a backend: the files of an op's folder are the table, names are strict, lists are tried in order."""

import sys

import jax
import jax.numpy as jnp
import mlt_kernels
import pytest
from mlt_kernels import dispatch

BACKEND = """
def unsupported(x):
    return {reason}

def run(x):
    return {name!r}, x
"""


@pytest.fixture
def op(tmp_path, monkeypatch):
    """A package folder with one op: `pallas_gpu` takes float32 only, `never` takes nothing."""
    folder = tmp_path / "toy_op"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    only_float32 = "None if x.dtype == 'float32' else f'x has dtype {x.dtype}; it takes float32'"
    reasons = {"reference": None, "chunked": None, "pallas_gpu": only_float32, "never": "'it takes nothing'"}
    for name, reason in reasons.items():
        (folder / f"{name}.py").write_text(BACKEND.format(name=name, reason=reason))
    for name in ("cases", "_private"):
        (folder / f"{name}.py").write_text("raise ImportError('not a backend')")
    monkeypatch.setattr(dispatch, "_ROOT", tmp_path)
    monkeypatch.setitem(dispatch.PREFERENCE, "gpu", ("pallas_gpu",))
    monkeypatch.setattr(mlt_kernels, "__path__", [*mlt_kernels.__path__, str(tmp_path)])
    yield "toy_op"
    for name in [name for name in sys.modules if name.startswith("mlt_kernels.toy_op")]:
        del sys.modules[name]


X = {"x": jnp.ones(3, jnp.float32)}
HALF = {"x": jnp.ones(3, jnp.bfloat16)}


def test_files_are_the_table(op):
    assert dispatch.ops() == ("toy_op",)
    assert dispatch.backends(op) == ("chunked", "never", "pallas_gpu")
    assert dispatch.selectable(op) == ("chunked", "never", "pallas_gpu", "reference")


def test_best_available_follows_the_platform(op):
    assert dispatch.call(op, None, X)[0] == "chunked"
    with dispatch.target_platform("gpu"):
        assert dispatch.call(op, None, X)[0] == "pallas_gpu"
        assert dispatch.call(op, None, HALF)[0] == "chunked"
    with dispatch.target_platform("tpu"):
        assert dispatch.choose(op, None, X) == "chunked"
    assert dispatch.platform() == "cpu"


def test_a_name_is_strict(op):
    assert dispatch.call(op, "reference", X)[0] == "reference"
    with pytest.raises(
        dispatch.UnsupportedError, match="toy_op: backend 'pallas_gpu' cannot run this call: x has dtype bfloat16"
    ):
        dispatch.call(op, "pallas_gpu", HALF)


def test_an_unknown_name_gets_the_nearest(op):
    with pytest.raises(
        ValueError, match=r"toy_op: no implementation 'palas_gpu'; present: chunked, .*; did you mean 'pallas_gpu'\?"
    ):
        dispatch.call(op, "palas_gpu", X)
    with pytest.raises(ValueError, match="no implementation 'cases'"):
        dispatch.call(op, "cases", X)
    with pytest.raises(ValueError, match="no implementation 'typo'"):
        dispatch.call(op, ["chunked", "typo"], X)


def test_a_list_is_tried_in_order(op):
    assert dispatch.call(op, ["never", "pallas_gpu", "chunked"], X)[0] == "pallas_gpu"
    with pytest.raises(dispatch.UnsupportedError) as error:
        dispatch.call(op, ["never", "pallas_gpu"], HALF)
    assert set(error.value.reasons) == {"never", "pallas_gpu"}
    assert "it takes nothing" in str(error.value)
    with pytest.raises(TypeError, match="implementation must be None, a name or a list of names"):
        dispatch.call(op, [], X)


def test_a_plan_runs_nothing(op):
    shape = jax.ShapeDtypeStruct((3,), jnp.bfloat16)
    with dispatch.target_platform("gpu"):
        plan = dispatch.plan(op, None, x=shape)
    assert plan == {"pallas_gpu": "x has dtype bfloat16; it takes float32", "chunked": None, "reference": None}


def test_errors_come_while_tracing(op):
    with pytest.raises(dispatch.UnsupportedError):
        jax.eval_shape(lambda x: dispatch.call(op, "never", {"x": x})[1], X["x"])


def test_unknown_platform():
    with pytest.raises(ValueError, match="unknown platform 'cuda'"), dispatch.target_platform("cuda"):
        pass
