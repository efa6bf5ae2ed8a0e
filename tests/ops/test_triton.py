"""What the Triton backends share: reasons why they cannot run here, and no import of Triton before one does."""

import importlib.util
import subprocess
import sys

import jax.numpy as jnp
import pytest
from mlt_kernels import causal_conv, dispatch, triton_calls

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
