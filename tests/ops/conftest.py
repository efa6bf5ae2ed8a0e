"""Which Triton tests can run: Triton is not a dependency, and decides when it is imported whether it interprets."""

import importlib.util
import os

import pytest

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
NUMBERS = "TRITON_INTERPRET=1 python -m pytest tests/ops -k triton"
PROGRAMS = "python -m pytest tests/ops -k triton"


@pytest.fixture
def triton_interpreter():
    """Skips unless Triton interprets its kernels in this process."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton (pip install triton 'numpy<2.3')")
    if not INTERPRET:
        pytest.skip(f"needs Triton's interpreter: {NUMBERS}")


@pytest.fixture
def triton_compiler():
    """Skips unless Triton compiles kernels in this process; that takes no GPU, but a jax with CUDA plugins."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton, jax-triton and jax-cuda12-plugin")
    if INTERPRET:
        pytest.skip(f"needs Triton's compiler: {PROGRAMS}")
    pytest.importorskip("jax_triton", exc_type=ImportError)
