"""Kernels of `diagonal_recurrence` and `selective_scan`, interpreted against float64 and lowered for the accelerators."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import mlt_kernels
import numpy as np
import pytest
from mlt_kernels import diagonal_recurrence, dispatch, pallas, selective_scan
from mlt_kernels.testing import (
    array_shapes_in,
    assert_close,
    cast_floating,
    check_isolation,
    cotangents,
    largest_array_in,
    value_and_grads,
)

DIAGONAL = importlib.import_module("mlt_kernels.diagonal_recurrence.cases")
SCAN = importlib.import_module("mlt_kernels.selective_scan.cases")
KERNELS = ("pallas_gpu", "pallas_tpu")
TOKENS = {"diagonal_recurrence": ["a", "b"], "selective_scan": ["x", "step", "B", "C"]}
FLAGS = {"segments": True, "state": True}
DATA = {"packed": {}, "extreme": {"strongest": -60.0}, "padding": {"all_padding": True}}
"""Same shapes, other numbers: one compiled program runs all of them."""
CASES = {
    "real": ("diagonal_recurrence", DIAGONAL.Case(B=2, T=65, channels=(5,), **FLAGS)),
    "cut": ("diagonal_recurrence", DIAGONAL.Case(B=2, T=64, channels=(2, 3), reverse=True, **FLAGS)),
    "complex": ("diagonal_recurrence", DIAGONAL.Case(B=1, T=33, channels=(3,), is_complex=True, **FLAGS)),
    "scan": ("selective_scan", SCAN.Case(B=2, T=37, D=5, N=3, skip=True, **FLAGS)),
}


@pytest.fixture(autouse=True)
def few_unrolled_tokens(monkeypatch):
    """The interpreter compiles every unrolled token; two or four show the same as sixteen."""
    gpu = {op: importlib.import_module(f"mlt_kernels.{op}.pallas_gpu") for op in TOKENS}
    monkeypatch.setattr(gpu["diagonal_recurrence"], "GROUP", 2)
    monkeypatch.setattr(gpu["diagonal_recurrence"], "SHORTEST_PIECE", 32)
    monkeypatch.setattr(gpu["selective_scan"], "GROUP", 2)
    monkeypatch.setattr(gpu["selective_scan"], "CHUNK", 16)
    for op in TOKENS:
        monkeypatch.setattr(importlib.import_module(f"mlt_kernels.{op}.pallas_tpu"), "UNROLL", 1)


def arguments(name, data="packed"):
    """(op, static options, array arguments)."""
    op, case = CASES[name]
    cases, changes = (DIAGONAL, SCAN)[op == "selective_scan"], dict(DATA[data])
    all_padding = changes.pop("all_padding", False)
    args = cases.arguments(dataclasses.replace(case, **changes))
    if all_padding:
        args["segment_ids"] = jnp.zeros_like(args["segment_ids"])
    static = {"return_final_state": True}
    if op == "diagonal_recurrence":
        static["reverse"] = args.pop("reverse")
    return op, static, args


@functools.cache
def compiled(name, implementation):
    op, static, _ = arguments(name)
    fn = functools.partial(getattr(mlt_kernels, op), **static, implementation=implementation)
    return fn, jax.jit(lambda args, cts: value_and_grads(fn, args, cotangent=cts))


def oracle(name, args, cts):
    with jax.enable_x64(True):
        wide = cast_floating((args, cts), jnp.float64)
        return jax.tree.map(np.asarray, compiled(name, "reference")[1](*wide))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_values_gradients_and_isolation(kernel, name):
    op, _, args = arguments(name)
    if name == "complex" and kernel == "pallas_tpu":
        pytest.skip("complex numbers have no TPU kernel")
    fn, run = compiled(name, kernel)
    with pallas.interpret():
        cts = cotangents(jax.eval_shape(lambda args: fn(**args), args))
        for data in DATA:
            args = arguments(name, data)[2]
            assert_close(run(args, cts), oracle(name, args, cts), max_rel=1e-5, what=f"{name}, {data}: ")
        args = arguments(name)[2]
        check_isolation(fn, args, np.asarray(args["segment_ids"]), token_arguments=TOKENS[op], compiled=run)


def test_bfloat16_rows_keep_float32_states():
    _, static, args = arguments("real")
    low = cast_floating(args, jnp.bfloat16)
    fn = functools.partial(diagonal_recurrence, **static)
    cts = cotangents(jax.eval_shape(lambda args: fn(**args), low))
    with pallas.interpret():
        (h, final), grads = jax.jit(
            lambda args: value_and_grads(functools.partial(fn, implementation="pallas_gpu"), args, cotangent=cts)
        )(low)
    assert (h.dtype, final.dtype, grads["a"].dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)
    assert_close(((h, final), grads), oracle("real", low, cts), max_rel=2e-2)


def test_refusals_say_why():
    a = jnp.ones((1, 4, 2))
    with pytest.raises(dispatch.UnsupportedError, match="planned for cpu"):
        diagonal_recurrence(a, a, implementation="pallas_gpu")
    big = jnp.ones((2, 65))
    with pallas.interpret(), pytest.raises(dispatch.UnsupportedError, match="65 states a channel"):
        selective_scan(a, a, big, jnp.ones((1, 4, 65)), jnp.ones((1, 4, 65)), implementation="pallas_gpu")
    with pallas.interpret(), pytest.raises(dispatch.UnsupportedError, match="complex"):
        diagonal_recurrence(a + 0j, a, implementation="pallas_tpu")


def shapes_of(op, dtype=jnp.bfloat16):
    """Standard bench shapes, as ShapeDtypeStructs."""
    made = jax.ShapeDtypeStruct
    if op == "diagonal_recurrence":
        rows = made((8, 4096, 4096), dtype)
        return {"a": rows, "b": rows, "segment_ids": made((8, 4096), jnp.int32)}
    rows, few, f32 = made((8, 2048, 4096), dtype), made((8, 2048, 16), dtype), jnp.float32
    A, skip, segments = made((4096, 16), f32), made((4096,), f32), made((8, 2048), jnp.int32)
    return {"x": rows, "step": made(rows.shape, f32), "A": A, "B": few, "C": few, "skip": skip, "segment_ids": segments}


@pytest.fixture
def default_sizes(monkeypatch, few_unrolled_tokens):
    monkeypatch.undo()


DEVICES = {"pallas_gpu": ("cuda", "NVIDIA H200", "gpu", "triton"), "pallas_tpu": ("tpu", "TPU v5e", "tpu", "tpu_custom_call")}


@pytest.mark.usefixtures("default_sizes")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("op", TOKENS)
def test_lowering_at_standard_shapes(op, kernel):
    target, kind, platform, call = DEVICES[kernel]
    shapes = shapes_of(op)
    first = next(iter(shapes))

    def fn(args):
        return value_and_grads(functools.partial(getattr(mlt_kernels, op), implementation=kernel), args, cotangent=args[first])

    with pallas.target_device(kind, platform=platform, cores=1 if platform == "tpu" else 132):
        text = jax.jit(fn).trace(shapes).lower(lowering_platforms=(target,)).as_text()
        largest = largest_array_in(fn, shapes)
    assert text.count(call) >= 2
    assert largest <= int(np.prod(shapes[first].shape)), "an array holds more than one number for each token and channel"


@pytest.mark.usefixtures("default_sizes")
@pytest.mark.parametrize("kernel", KERNELS)
def test_states_in_front_of_chunks_are_kept_for_gradients_alone(kernel):
    _, kind, platform, _ = DEVICES[kernel]
    scan = functools.partial(mlt_kernels.selective_scan, implementation=kernel)

    def kept(fn):
        with pallas.target_device(kind, platform=platform, cores=1 if platform == "tpu" else 132):
            return {s for s in array_shapes_in(fn, shapes_of("selective_scan")) if len(s) == 4 and s[2:] == (16, 4096)}

    assert not kept(lambda args: scan(**args))
    assert kept(lambda args: value_and_grads(scan, args, cotangent=args["x"]))


@pytest.mark.usefixtures("default_sizes")
def test_one_long_row_is_cut_into_pieces():
    rows = jax.ShapeDtypeStruct((1, 131072, 4096), jnp.bfloat16)

    def fn(a, b):
        op = functools.partial(diagonal_recurrence, implementation="pallas_gpu")
        return value_and_grads(op, {"a": a, "b": b}, cotangent=a)

    with pallas.target_device():
        text = jax.jit(fn).trace(rows, rows).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@triton") + text.count("custom_call") >= 4
