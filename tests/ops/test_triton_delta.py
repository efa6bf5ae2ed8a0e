"""The delta rule's Triton kernels: interpreted against float64 (TRITON_INTERPRET=1), lowered for a GPU without it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mlt_kernels import dispatch, linear_recurrence, triton_calls
from mlt_kernels.linear_recurrence import _triton_delta
from mlt_kernels.linear_recurrence.cases import Case, arguments, one_key
from mlt_kernels.testing import (
    array_shapes_in,
    assert_close,
    assert_same_bits,
    cast_floating,
    check_causality,
    check_isolation,
    cotangents,
    value_and_grads,
)

T = 45  # no multiple of 16; three chunks of 16, two of 32
PACKED = np.stack(
    [
        np.r_[np.full(9, 1), 2, 3, np.full(21, 4), np.full(7, 5), np.full(3, 6), np.zeros(3)],  # of one token; to a chunk's end
        np.r_[np.full(24, 1), np.full(21, 2)],
        np.zeros(T),  # nothing but padding
    ]
).astype(np.int32)
CASES = {
    "delta": Case(T=T, Hk=1, H=2, K=16, V=32, decay="none", documents=None),
    "gated_delta": Case(T=T, Hk=2, H=2, K=20, V=5, documents=None),
    "kda": Case(T=T, Hk=1, H=2, K=16, V=24, decay="vector", documents=None),
}
"""Key and value dims that are powers of two and that are not; query/key heads that two value heads read and that one does."""
TOKENS = ("q", "k", "v", "log_decay", "beta")


def made(name):
    return arguments(dataclasses.replace(CASES[name], B=len(PACKED))) | {"segment_ids": jnp.asarray(PACKED)}


def fn(implementation, **args):
    """o, the final state and the states that enter each 32 tokens."""
    options = {"chunk_size": 32, "return_final_state": True, "return_chunk_states": True}
    return linear_recurrence(**args, **options, rule="delta", implementation=implementation)


def grads_of(implementation, args, cts):
    names = [name for name in args if name != "segment_ids"]
    return value_and_grads(functools.partial(fn, implementation), args, wrt=names, cotangent=cts)


interpreted = jax.jit(functools.partial(grads_of, "triton_gpu"))
reference = jax.jit(functools.partial(grads_of, "reference"))


def kernels(args, cts):
    with triton_calls.interpret():
        return jax.tree.map(np.asarray, interpreted(args, cts))


def cts_of(args):
    return cotangents(jax.eval_shape(functools.partial(fn, "reference"), **args))


def oracle(args, cts):
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, reference(cast_floating(args, jnp.float64), cast_floating(cts, jnp.float64)))


def hard_rows(name):
    """Names, and arrays with a row for each of them."""
    args, rows = made(name), {}
    # Of norm 1 to the bit: one rounding of k . k, alike in every token, would add up over the row.
    one_key = jnp.where(jnp.arange(args["k"].shape[-1]) < 16, jnp.sign(args["k"][:1, :1]) / 4, 0)

    def near(spread):
        k = one_key + spread * args["k"][:1]
        return k / jnp.linalg.norm(k, axis=-1, keepdims=True) if spread else jnp.broadcast_to(k, args["k"][:1].shape)

    whole, ones = jnp.ones((1, T), jnp.int32), jnp.ones_like(args["beta"][:1])
    first = {x: args[x][:1] for x in args}
    rows |= {"packed": {}, "one document": {"segment_ids": whole}, "padding": {"segment_ids": 0 * whole}}
    rows |= {"zero keys": {"k": first["k"].at[:, 3:20].set(0)}}
    rows |= {f"beta {x}": {"beta": x * ones} for x in (0.0, 1.0, 2.0)}
    rows |= {f"one key, spread {x}, beta 2": {"k": near(x), "beta": 2 * ones, "segment_ids": whole} for x in (0, 0.1)}
    if "log_decay" in args:
        gates = first["log_decay"]
        uniform = np.random.default_rng(1).uniform(-60, 0, gates.shape)
        rows["decays down to -60"] = {"log_decay": jnp.asarray(uniform, gates.dtype), "segment_ids": whole}
        # Small gradients everywhere: nothing large may cancel in them.
        rows["all tokens forget alike"] = {"log_decay": jnp.full_like(gates, -9.0), "segment_ids": whole}
        # One float32 running sum would have lost the last digits of the mild ones.
        mild = np.where(np.arange(T) % 16 < 5, -60.0, -0.01).reshape(1, T, *[1] * (gates.ndim - 2))
        rows["mild decays after strong ones"] = {"log_decay": mild + jnp.zeros_like(gates), "segment_ids": whole}
        rows["a reset by the gate"] = {"log_decay": gates.at[:, 20].set(-jnp.inf), "segment_ids": whole}
    joined = [first | changed for changed in rows.values()]
    return list(rows), {x: jnp.concatenate([row[x] for row in joined]) for x in args}


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    """Row by row, each against its own largest numbers."""
    names, args = hard_rows(name)
    cts = cts_of(args)
    found, wanted = kernels(args, cts), oracle(args, cts)
    for n, what in enumerate(names):
        row = functools.partial(jax.tree.map, lambda x: x[n])  # noqa: B023
        assert_close(row(found), row(wanted), max_rel=1e-5, what=f"{name}, {what}: ")


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("name", CASES)
def test_chunks_of_four_blocks(name, monkeypatch):
    """Chunks of 64 tokens, as bfloat16 has them on a GPU; no documents, no initial state and no gates but the decays."""
    monkeypatch.setattr(_triton_delta, "chunk_length", lambda *_: 64)
    args = arguments(dataclasses.replace(CASES[name], B=1, T=77, beta=False, state=False))

    def bare(implementation, args):
        op = functools.partial(linear_recurrence, rule="delta", implementation=implementation)
        return value_and_grads(op, args)

    with triton_calls.interpret():
        found = jax.tree.map(np.asarray, jax.jit(functools.partial(bare, "triton_gpu"))(args))
    with jax.enable_x64(True):
        wanted = jax.jit(functools.partial(bare, "reference"))(cast_floating(args, jnp.float64))
        assert_close(found, jax.tree.map(np.asarray, wanted), max_rel=1e-5, what=name)


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("name", CASES)
def test_documents_are_isolated_to_the_bit(name):
    args = made(name)
    tokens = [t for t in TOKENS if t in args]
    run = functools.partial(fn, "reference")
    documents = [(0, 2), (0, 4), (1, 1)]
    check_isolation(run, args, PACKED, token_arguments=tokens, documents=documents, compiled=kernels)


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("name", CASES)
def test_causal_to_the_bit(name):
    args = made(name) | {"segment_ids": jnp.ones((len(PACKED), T), jnp.int32)}
    tokens = [t for t in TOKENS if t in args]
    forward = jax.jit(lambda args: fn("triton_gpu", **args)[0])
    with triton_calls.interpret():
        check_causality(functools.partial(fn, "reference"), args, token_arguments=tokens, positions=(1, 20), compiled=forward)


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("name", CASES)
def test_padding_writes_nothing_and_keeps_the_state(name):
    """A row of padding gives o = 0 and its initial state back, and no input there has a gradient."""
    args = made(name)
    (o, final, _), grads = kernels(args, cts_of(args))
    padding = PACKED == 0
    for x in (o, *(grads[t] for t in TOKENS if t in grads)):
        assert_same_bits(x[padding], np.zeros_like(x[padding]))
    assert_same_bits(final[2], np.asarray(args["initial_state"])[2])


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("name", CASES)
def test_bfloat16_operands(name):
    """Operands of 16 bits, gates and states of 32: within 2 % of the same numbers computed in float64."""
    args = made(name)
    args = args | {x: args[x].astype(jnp.bfloat16) for x in ("q", "k", "v")}
    cts = cts_of(args)
    found = kernels(args, cts)
    assert found[0][0].dtype == found[1]["k"].dtype == found[1]["v"].dtype == jnp.bfloat16
    assert found[0][1].dtype == found[1]["beta"].dtype == jnp.float32
    assert_close(found, oracle(args, cts), max_rel=2e-2, what=name)


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize(("dtype", "limit"), [(jnp.bfloat16, 2e-2), (jnp.float32, 3e-5)])
@pytest.mark.parametrize("decay", ["none", "scalar", "vector"])
def test_a_key_that_repeats(decay, dtype, limit):
    """150 tokens with one key, beta 2 and next to no decay: most of what a chunk sums up cancels.

    Float32: in float64 the results move by up to 9.7e-6 where every input moves by one unit in its last place. `error_table`
    allows three times that.
    """
    args = one_key(decay, dtype=dtype)
    run = functools.partial(linear_recurrence, rule="delta", return_final_state=True)

    def both(implementation, args, cts):
        return value_and_grads(functools.partial(run, implementation=implementation), args, cotangent=cts)

    cts = cotangents(jax.eval_shape(functools.partial(run, implementation="reference"), **args))
    with triton_calls.interpret():
        found = jax.tree.map(np.asarray, jax.jit(functools.partial(both, "triton_gpu"))(args, cts))
    with jax.enable_x64(True):
        wide = cast_floating((args, cts), jnp.float64)
        wanted = jax.tree.map(np.asarray, jax.jit(functools.partial(both, "reference"))(*wide))
    assert_close(found, wanted, max_rel=limit, what=decay)


@pytest.mark.usefixtures("triton_compiler")
@pytest.mark.parametrize(
    ("K", "V", "decay", "dtype"),
    [
        (128, 128, "scalar", jnp.bfloat16),
        (128, 128, "none", jnp.float32),
        (256, 80, "scalar", jnp.bfloat16),
        (128, 128, "vector", jnp.bfloat16),
        (64, 64, "vector", jnp.float32),
    ],
)
def test_lowering_and_what_is_stored(K, V, decay, dtype):
    """The kernels at a real size; no (T, T), and states at chunk borders only."""
    rows, time, heads, key_heads, f32, shape = 8, 4096, 32, 16, jnp.float32, jax.ShapeDtypeStruct
    args = {name: shape((rows, time, key_heads, K), dtype) for name in ("q", "k")}
    args |= {"v": shape((rows, time, heads, V), dtype), "beta": shape((rows, time, heads), f32)}
    if decay != "none":
        args["log_decay"] = shape((rows, time, heads, K) if decay == "vector" else (rows, time, heads), f32)
    args["segment_ids"] = shape((rows, time), jnp.int32)

    def call(args):
        op = functools.partial(linear_recurrence, rule="delta", implementation="triton_gpu", return_final_state=True)
        wrt = [name for name in args if name != "segment_ids"]
        return value_and_grads(op, args, wrt=wrt, cotangent=jax.tree.map(jnp.ones_like, op(**args)))

    with dispatch.target_platform("gpu"):
        text = jax.jit(call).trace(args).lower(lowering_platforms=("cuda",)).as_text()
        shapes = array_shapes_in(call, args)
        chunk = _triton_delta.chunk_length(K, V, jnp.dtype(dtype).itemsize)
    assert text.count("triton_kernel_call") == (10 if decay == "vector" else 6)
    assert not [s for s in shapes if s.count(time) > 1]
    states = [np.prod(s) for s in shapes if s[-2:] == (K, V) and len(s) == 5]
    assert states
    assert all(n <= rows * heads * K * V * time // chunk for n in states)
