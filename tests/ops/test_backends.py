"""Every op and backend found by its folder: an op is whole, and a backend file is checked from the day it appears."""

import importlib
import inspect

import jax
import jax.numpy as jnp
import mlt_kernels
import numpy as np
import pytest
from mlt_kernels import dispatch
from mlt_kernels.testing import assert_close, cast_floating, differentiable, value_and_grads

OPS = dispatch.ops()
PAIRS = [(op, backend) for op in OPS for backend in dispatch.backends(op)]


def cases(op):
    return importlib.import_module(f"mlt_kernels.{op}.cases")


def test_the_ops_of_the_contract_are_there():
    contract = {"linear_recurrence", "diagonal_recurrence", "attention", "causal_conv", "cross_entropy", "grouped_matmul"}
    assert contract | {"row_lookup"} <= set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_whole(op):
    public = getattr(mlt_kernels, op)
    assert op in mlt_kernels.__all__
    assert "implementation" in inspect.signature(public).parameters
    assert public.__doc__
    assert "chunked" in dispatch.backends(op)
    assert cases(op).TESTS
    assert cases(op).BENCHES


@pytest.mark.parametrize(("op", "backend"), [*PAIRS, *((op, "reference") for op in OPS)])
def test_a_backend_takes_what_the_reference_takes(op, backend):
    module, reference = dispatch.load(op, backend), dispatch.load(op, "reference")
    assert inspect.signature(module.run).parameters.keys() == inspect.signature(reference.run).parameters.keys()
    assert callable(module.unsupported)


@pytest.mark.parametrize(("op", "backend"), PAIRS)
def test_a_backend_agrees_with_the_oracle(op, backend):
    """The first case of each op; the op's own tests go through the rest."""
    public, module = getattr(mlt_kernels, op), cases(op)
    arguments = module.arguments(next(iter(module.TESTS.values())))
    arrays = {name: arguments[name] for name in differentiable(arguments)}
    rest = {name: value for name, value in arguments.items() if name not in arrays}

    def run(implementation, arrays):
        def fn(**arrays):
            return public(**rest, **arrays, implementation=implementation)

        return value_and_grads(fn, arrays)

    with jax.enable_x64(True):
        wanted = jax.tree.map(np.asarray, run("reference", cast_floating(arrays, jnp.float64)))
    try:
        found = jax.jit(lambda arrays: run(backend, arrays))(arrays)
    except dispatch.UnsupportedError as error:
        pytest.skip(str(error).splitlines()[0])
    assert_close(found, wanted, max_rel=1e-5, what=f"{op}, {backend}: ")
