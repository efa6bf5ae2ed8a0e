"""The delta rule's Pallas kernels, interpreted: numbers against the float64 token loop, borders to the bit, lowering."""

import dataclasses
import functools
import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mlt_kernels import linear_recurrence, pallas
from mlt_kernels.linear_recurrence import pallas_gpu, pallas_tpu
from mlt_kernels.linear_recurrence.cases import Case, arguments, one_key
from mlt_kernels.testing import (
    assert_close,
    assert_same_bits,
    cast_floating,
    check_causality,
    check_isolation,
    cotangents,
    value_and_grads,
)

T = 83  # no multiple of 16, three chunks of 32 and two of 64
CASES = {
    "delta": Case(T=T, Hk=1, H=2, K=16, V=32, decay="none"),
    "gated_delta": Case(T=T, Hk=1, H=2, K=32, V=16),
    "kda": Case(T=T, Hk=2, H=2, K=16, V=32, decay="vector"),
}
RUNS = [("pallas_gpu", name) for name in CASES] + [("pallas_tpu", "gated_delta"), ("pallas_tpu", "kda")]
LOW_RUNS = [("pallas_gpu", "gated_delta"), ("pallas_gpu", "kda"), ("pallas_tpu", "gated_delta")]
if os.environ.get("MLT_FULL") == "1":
    RUNS += [("pallas_tpu", "delta")]
    LOW_RUNS += [("pallas_tpu", "kda")]
# Float32: in float64 the results move by up to 9.7e-6 where every input moves by one unit in its last place. `error_table` allows
# three times that.
LIMITS = {jnp.bfloat16: 2e-2, jnp.float32: 3e-5}
REPEATED = [("pallas_gpu", "none", jnp.bfloat16), ("pallas_gpu", "scalar", jnp.bfloat16), ("pallas_gpu", "scalar", jnp.float32)]
REPEATED += [
    ("pallas_gpu", "vector", jnp.bfloat16),
    ("pallas_tpu", "scalar", jnp.bfloat16),
    ("pallas_tpu", "vector", jnp.bfloat16),
]
if os.environ.get("MLT_FULL") == "1":
    REPEATED = list(itertools.product(("pallas_gpu", "pallas_tpu"), ("none", "scalar", "vector"), LIMITS))
REPEATED = [(*run, LIMITS[run[2]]) for run in REPEATED]
TOKENS = ("q", "k", "v", "log_decay", "beta")


@functools.cache
def made(name):
    args = arguments(CASES[name])
    # Row 0: documents of one token and more, some starting or ending at and inside chunks, then padding. Row 1: all padding.
    ends = np.cumsum([5, 1, 26, 1, 1, 20, 16])
    row = np.searchsorted(ends, np.arange(T), side="right") + 1
    args["segment_ids"] = jnp.asarray(np.stack([np.where(row > len(ends), 0, row), np.zeros(T)]), jnp.int32)
    return args


def fn(implementation, **args):
    """o and the final state; with float32 operands also the states that enter the chunks of 64 tokens."""
    states = args["q"].dtype != jnp.bfloat16
    options = {"return_final_state": True, "return_chunk_states": states, "implementation": implementation}
    return linear_recurrence(**args, rule="delta", **options)


def grads_of(implementation, args, cts):
    names = [name for name in args if name != "segment_ids"]
    return value_and_grads(functools.partial(fn, implementation), args, wrt=names, cotangent=cts)


# One compilation for each kind of decay and dtype (JAX keeps it by the shapes), in half the time without LLVM's optimizer.
interpreted = jax.jit(grads_of, static_argnums=0)
reference = jax.jit(functools.partial(grads_of, "reference"))


def kernels(backend, args, cts):
    with pallas.interpret():
        return interpreted(backend, args, cts)


def cts_of(args):
    return cotangents(jax.eval_shape(functools.partial(fn, "reference"), **args))


def oracle(args):
    """Values and gradients in float64, for bfloat16 operands without chunk states too."""
    with jax.enable_x64(True):
        wide = cast_floating(args, jnp.float64)
        cts = cts_of(wide)
        if args["q"].dtype == jnp.bfloat16:
            cts = (*cts[:2], jnp.zeros_like(cts[2]))
        result, grads = jax.tree.map(np.asarray, reference(wide, cts))
        return (result[:2] if args["q"].dtype == jnp.bfloat16 else result), grads


def hard_inputs(name):
    case, args = CASES[name], made(name)
    k, ones = args["k"], jnp.ones_like(args["beta"])
    whole = {"segment_ids": jnp.ones((2, T), jnp.int32)}
    inputs = {"packed": {}, "one document": whole, "zero keys": {"k": k.at[:, 3:20].set(0)}}
    inputs |= {f"beta {x}": {"beta": x * ones} for x in (0.0, 1.0, 2.0)}
    for spread in (0.0, 0.1):
        one = k[:, :1] + spread * k
        one = jnp.broadcast_to(one / jnp.linalg.norm(one, axis=-1, keepdims=True), k.shape)
        inputs[f"one key, spread {spread}, beta 2"] = whole | {"k": one, "beta": 2 * ones}
    if "log_decay" in args:
        gates = args["log_decay"]
        for strongest in (-60.0, -1000.0):
            strong = arguments(dataclasses.replace(case, strongest=strongest))["log_decay"]
            inputs[f"decays down to {strongest}"] = whole | {"log_decay": strong}
        # Small gradients everywhere: nothing large may cancel in them.
        inputs["all tokens forget alike"] = whole | {"log_decay": jnp.full_like(gates, -9.0)}
        # One float32 running sum would have lost the last digits of the mild ones.
        strong = np.where(np.arange(T) % 16 < 5, -60.0, -0.01).reshape(1, T, *[1] * (gates.ndim - 2))
        inputs["mild decays after strong ones"] = whole | {
            "log_decay": jnp.broadcast_to(jnp.asarray(strong, gates.dtype), gates.shape)
        }
        inputs["a reset by the gate"] = whole | {"log_decay": gates.at[:, 40].set(-jnp.inf)}
    return inputs


@pytest.mark.parametrize(("backend", "name"), RUNS)
def test_values_and_gradients(backend, name):
    for what, changed in hard_inputs(name).items():
        args = made(name) | changed
        assert_close(kernels(backend, args, cts_of(args)), oracle(args), max_rel=1e-5, what=f"{name}, {what}: ")


@pytest.mark.parametrize(("backend", "name"), RUNS)
def test_documents_are_isolated_to_the_bit(backend, name):
    args = made(name)
    tokens = [t for t in TOKENS if t in args]
    segments = np.asarray(args["segment_ids"])
    documents = [(0, s) for s in (1, 2, 3, 5, 7)]
    run, compiled = functools.partial(fn, "reference"), functools.partial(kernels, backend)
    check_isolation(run, args, segments, token_arguments=tokens, documents=documents, compiled=compiled)


@pytest.mark.parametrize(("backend", "name"), RUNS)
def test_causal_to_the_bit(backend, name):
    args = made(name) | {"segment_ids": jnp.ones((2, T), jnp.int32)}
    cts = cts_of(args)
    tokens = [t for t in TOKENS if t in args]
    run = functools.partial(fn, "reference")
    compiled = functools.partial(kernels, backend, cts=cts)
    check_causality(run, args, token_arguments=tokens, positions=(1, 16, 40, 82), compiled=lambda args: compiled(args)[0][0])


@pytest.mark.parametrize(("backend", "name"), RUNS)
def test_padding_gives_zero_and_keeps_the_state(backend, name):
    args = made(name)
    (o, last, _), grads = kernels(backend, args, cts_of(args))
    padding = np.asarray(args["segment_ids"]) == 0
    for x in (o, *(grads[t] for t in TOKENS if t in grads)):
        assert_same_bits(np.asarray(x)[padding], np.zeros_like(x)[padding])
    assert_same_bits(last[1], args["initial_state"][1])


@pytest.mark.parametrize(("backend", "name"), LOW_RUNS)
def test_bfloat16(backend, name):
    """On a GPU chunks of 64: within 2 % of the same numbers computed in float64, gates and states in float32."""
    args = made(name)
    args = args | {x: args[x].astype(jnp.bfloat16) for x in ("q", "k", "v")} | {"segment_ids": jnp.ones((2, T), jnp.int32)}
    found = kernels(backend, args, cts_of(args))
    assert found[0][0].dtype == found[1]["k"].dtype == jnp.bfloat16
    assert found[0][1].dtype == found[1]["log_decay"].dtype == jnp.float32
    assert_close(found, oracle(args), max_rel=2e-2)


def sizes(B, T, Hk, H, K, V, decay, dtype):
    S, f32 = jax.ShapeDtypeStruct, jnp.float32
    args = {"q": S((B, T, Hk, K), dtype), "k": S((B, T, Hk, K), dtype), "v": S((B, T, H, V), dtype), "beta": S((B, T, H), f32)}
    if decay != "none":
        args["log_decay"] = S((B, T, H, K) if decay == "vector" else (B, T, H), f32)
    return args | {"segment_ids": S((B, T), jnp.int32), "initial_state": S((B, H, K, V), f32)}


@pytest.mark.parametrize(
    ("shape", "decay", "dtype"),
    [
        ((8, 4096, 32, 32, 128, 128), "scalar", jnp.bfloat16),
        ((1, 32768, 16, 16, 128, 128), "scalar", jnp.bfloat16),
        ((8, 4096, 16, 32, 128, 128), "none", jnp.bfloat16),
        ((8, 4096, 32, 32, 128, 128), "vector", jnp.bfloat16),
        ((2, 1100, 2, 4, 64, 256), "scalar", jnp.float32),
        ((2, 1100, 4, 4, 256, 64), "vector", jnp.float32),
    ],
)
def test_lowers_for_cuda(shape, decay, dtype):
    """The Triton programs of forward and backward, from a host with no GPU."""
    args = sizes(*shape, decay, dtype)
    B, _, _, H, K, V = shape
    state = jax.ShapeDtypeStruct((B, H, K, V), jnp.float32)
    states = jax.ShapeDtypeStruct((B, -(-shape[1] // 64), H, K, V), jnp.float32)
    cts = (args["v"], state) if dtype == jnp.bfloat16 else (args["v"], state, states)
    call_for_gpu = jax.jit(lambda args, cts: grads_of("pallas_gpu", args, cts))
    with pallas.target_device():
        text = call_for_gpu.trace(args, cts).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == (6 if decay == "vector" else 5)


@pytest.mark.parametrize(
    ("shape", "decay", "dtype"),
    [((8, 4096, 16, 32, 128, 128), "scalar", jnp.bfloat16), ((2, 1100, 2, 4, 24, 256), "vector", jnp.float32)],
)
def test_lowers_for_tpu(shape, decay, dtype):
    """The Mosaic programs of forward and backward, from a host with no TPU."""
    args = sizes(*shape, decay, dtype)
    result = jax.eval_shape(functools.partial(fn, "reference"), **args)
    with pallas.target_device("TPU v5e", platform="tpu"):
        traced = jax.jit(lambda args, cts: grads_of("pallas_tpu", args, cts)).trace(args, result)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 3


@pytest.mark.parametrize(("backend", "decay", "dtype", "limit"), REPEATED)
def test_a_key_that_repeats(backend, decay, dtype, limit):
    """150 tokens with one key, beta 2 and next to no decay: most of what a chunk sums up cancels."""
    args = one_key(decay, dtype=dtype)
    cts = cts_of(args)
    (o, last, *_), grads = kernels(backend, args, cts)
    (wanted, wanted_last, *_), wanted_grads = oracle(args)
    assert_close((o, last, grads), (wanted, wanted_last, wanted_grads), max_rel=limit)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"K": 48}, "K=48, V=32; tiles are powers of two from 16 to 256"),
        ({"V": 512}, "K=32, V=512"),
        ({"dtype": jnp.float16}, "operands are bfloat16 or float32"),
    ],
)
def test_what_it_cannot_run_is_said(changes, reason):
    size = {"B": 1, "T": 64, "Hk": 2, "H": 2, "K": 32, "V": 32, "decay": "none", "dtype": jnp.bfloat16} | changes
    args = {"log_decay": None, "rule": "delta", "log_input": None, "normalizer": "none", "scale": 1.0, "chunk_size": 64} | sizes(
        **size
    )
    with pallas.interpret():
        said = pallas_gpu.unsupported(**args, return_final_state=False, return_chunk_states=False)
    assert said
    assert reason in said


@pytest.mark.parametrize(
    ("K", "reason"),
    [
        (20, "K=20, V=32; a TPU's tiles have 8 rows"),
        (512, "K=512 with a log_decay of every key dim"),
        (1024, "K=1024, V=32; the kernels take dims of up to 512"),
    ],
)
def test_what_a_tpu_kernel_cannot_run_is_said(K, reason):
    args = {"rule": "delta", "log_input": None, "normalizer": "none", "scale": 1.0, "chunk_size": 64}
    args |= sizes(B=1, T=64, Hk=2, H=2, K=K, V=32, decay="vector", dtype=jnp.bfloat16)
    with pallas.interpret():
        said = pallas_tpu.unsupported(**args, return_final_state=False, return_chunk_states=False)
    assert said
    assert said.startswith(reason)
