"""The add rule's Triton kernels: interpreted against float64 (TRITON_INTERPRET=1), lowered for a GPU without it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mlt_kernels import dispatch, linear_recurrence, triton_calls
from mlt_kernels.linear_recurrence import _triton_add
from mlt_kernels.linear_recurrence.cases import Case, arguments
from mlt_kernels.testing import (
    array_shapes_in,
    assert_close,
    assert_same_bits,
    cast_floating,
    check_isolation,
    cotangents,
    value_and_grads,
)

SEGMENTS = np.stack(
    [
        np.r_[np.full(9, 1), 2, 3, np.full(48, 4), np.full(12, 5), np.full(6, 6)],  # length 1; across a chunk; to the end
        np.r_[np.full(40, 1), np.full(20, 2), np.zeros(17)],  # a padded tail
        np.zeros(77),  # nothing but padding
    ]
).astype(np.int32)
B, T = SEGMENTS.shape
STATIC = ("rule", "normalizer", "chunk_size", "return_chunk_states")
TOKENS = ("q", "k", "v", "log_decay", "beta", "log_input")

SMALL = Case(B=B, T=T, Hk=1, H=2, K=16, V=32, documents=None)
CASES = {
    "states": dataclasses.replace(SMALL, log_input=True, options={"chunk_size": 32, "return_chunk_states": True}),
    "none": dataclasses.replace(SMALL, decay="none", Hk=2, K=32, V=16, beta=False, state=False),
    "odd": dataclasses.replace(SMALL, K=20, V=5, beta=False),
    "vector": dataclasses.replace(SMALL, decay="vector", options={"chunk_size": 32, "return_chunk_states": True}),
    "vector odd": dataclasses.replace(SMALL, decay="vector", Hk=2, K=20, V=5, beta=False),
    "mlstm": dataclasses.replace(SMALL, log_input=True, beta=False, options={"normalizer": "mlstm"}),
}
"""`odd` has dims that are no powers of two; in `none` each value head has its own key head."""


def split(case):
    """(function of the array arguments that gives o, the final state and so on, array arguments)."""
    made = arguments(case)
    static = {name: made.pop(name) for name in STATIC if name in made}
    made["segment_ids"] = jnp.asarray(SEGMENTS)
    return functools.partial(linear_recurrence, return_final_state=True, **static), made


def wrt(args):
    return tuple(name for name in args if name != "segment_ids")


def run(name, args, cts):
    fn = functools.partial(split(CASES[name])[0], implementation="triton_gpu")
    with triton_calls.interpret():
        found = jax.jit(lambda args, cts: value_and_grads(fn, args, wrt=wrt(args), cotangent=cts))(args, cts)
        return jax.tree.map(np.asarray, found)


def found(name, args):
    fn, _ = split(CASES[name])
    return run(name, args, cotangents(jax.eval_shape(lambda args: fn(**args, implementation="reference"), args)))


@functools.cache
def compiled_oracle(name):
    fn = functools.partial(split(CASES[name])[0], implementation="reference")
    return jax.jit(lambda args: value_and_grads(fn, args, wrt=wrt(args)))


def oracle(name, args):
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, compiled_oracle(name)(cast_floating(args, jnp.float64)))


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    _, args = split(CASES[name])
    assert_close(found(name, args), oracle(name, args), max_rel=1e-5, what=name)


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("name", ["states", "odd", "vector"])
def test_strong_decays(name):
    """Down to -60; and all alike, where every gradient is small and none may be a small difference of large numbers."""
    _, args = split(CASES[name])
    strong = split(dataclasses.replace(CASES[name], strongest=-60.0))[1]["log_decay"]
    for gates in (strong, jnp.full_like(strong, -9.0)):
        changed = args | {"log_decay": gates}
        assert_close(found(name, changed), oracle(name, changed), max_rel=1e-5, what=name)


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("name", ["states", "none", "vector", "mlstm"])
def test_documents_are_isolated_to_the_bit(name):
    fn, args = split(CASES[name])
    tokens = [t for t in TOKENS if t in args and args[t].ndim > 1]
    fn = functools.partial(fn, implementation="reference")
    documents = [(0, 4)] if name == "mlstm" else [(0, 2), (0, 4), (1, 1)]
    check_isolation(fn, args, SEGMENTS, token_arguments=tokens, documents=documents, compiled=functools.partial(run, name))


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("name", ["states", "vector"])
def test_padding_writes_nothing_and_keeps_the_state(name):
    """A row of padding gives o = 0 and its initial state back, and no input there has a gradient."""
    _, args = split(CASES[name])
    (o, final, *_), grads = found(name, args)
    padding = SEGMENTS == 0
    assert_same_bits(o[padding], np.zeros_like(o[padding]))
    assert_same_bits(final[2], np.asarray(args["initial_state"])[2])
    for token in (x for x in TOKENS if x in grads):
        assert_same_bits(grads[token][padding], np.zeros_like(grads[token][padding]), what=token)


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("decay", ["head", "vector"])
def test_a_bare_call(decay):
    """No documents, nothing but a decay, a row that is no whole number of chunks."""
    args = arguments(dataclasses.replace(SMALL, B=1, T=21, decay=decay, beta=False, state=False))

    def fn(args, implementation):
        return value_and_grads(functools.partial(linear_recurrence, implementation=implementation), args)

    with triton_calls.interpret():
        got = jax.tree.map(np.asarray, fn(args, "triton_gpu"))
    with jax.enable_x64(True):
        want = jax.jit(functools.partial(fn, implementation="reference"))(cast_floating(args, jnp.float64))
        want = jax.tree.map(np.asarray, want)
    assert_close(got, want, max_rel=1e-5)


@pytest.mark.usefixtures("triton_interpreter")
def test_pairs_of_long_chunks_under_vector_decays(monkeypatch):
    """In chunks of 64, as on a GPU, pairs meet at six levels."""
    monkeypatch.setattr(_triton_add, "chunk_length", lambda *_: 64)
    args = arguments(Case(B=1, T=100, Hk=1, H=1, K=5, V=16, decay="vector", documents=None, strongest=-60.0))
    # Few strong decays, so that tokens far apart still meet.
    args["log_decay"] = jnp.where(jnp.arange(100)[:, None, None] % 19 == 7, 1.0, 1e-3) * args["log_decay"]
    args["segment_ids"] = jnp.repeat(jnp.array([[4, 6]]), jnp.array([71, 29]), axis=1)

    def fn(args, implementation):
        op = functools.partial(linear_recurrence, implementation=implementation, return_final_state=True)
        return value_and_grads(op, args, wrt=wrt(args))

    with triton_calls.interpret():
        got = jax.tree.map(np.asarray, fn(args, "triton_gpu"))
    with jax.enable_x64(True):
        want = jax.jit(functools.partial(fn, implementation="reference"))(cast_floating(args, jnp.float64))
        want = jax.tree.map(np.asarray, want)
    assert_close(got, want, max_rel=1e-5)


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("name", ["states", "vector"])
def test_bfloat16_operands(name):
    """Operands of 16 bits, gates and states of 32: within 2 % of the same numbers computed in float64."""
    _, args = split(CASES[name])
    low = args | {x: args[x].astype(jnp.bfloat16) for x in ("q", "k", "v")}
    results, grads = found(name, low)
    assert results[0].dtype == grads["q"].dtype == grads["v"].dtype == jnp.bfloat16
    assert results[1].dtype == grads["log_decay"].dtype == jnp.float32
    assert_close((results, grads), oracle(name, low), max_rel=2e-2)


@pytest.mark.usefixtures("triton_compiler")
@pytest.mark.parametrize(
    ("K", "V", "dtype", "decay"),
    [
        (128, 128, jnp.bfloat16, "scalar"),
        (128, 128, jnp.float32, "scalar"),
        (256, 80, jnp.bfloat16, "scalar"),
        (128, 128, jnp.bfloat16, "vector"),
        (80, 256, jnp.float32, "vector"),
    ],
)
def test_lowering_and_what_is_stored(K, V, dtype, decay):
    """Every kernel at a real size; no (T, T), and states of one chunk in sixteen at most."""
    rows, time, heads, key_heads, f32, made = 8, 4096, 32, 16, jnp.float32, jax.ShapeDtypeStruct
    args = {name: made((rows, time, key_heads, K), dtype) for name in ("q", "k")}
    gate = (rows, time, heads)
    args |= {"beta": made(gate, f32), "log_decay": made((*gate, K) if decay == "vector" else gate, f32)}
    args |= {"v": made((rows, time, heads, V), dtype), "segment_ids": made((rows, time), jnp.int32)}

    def fn(args):
        op = functools.partial(linear_recurrence, implementation="triton_gpu", return_final_state=True)
        return value_and_grads(op, args, wrt=wrt(args), cotangent=jax.tree.map(jnp.ones_like, op(**args)))

    with dispatch.target_platform("gpu"):
        text = jax.jit(fn).trace(args).lower(lowering_platforms=("cuda",)).as_text()
        shapes = array_shapes_in(fn, args)
    assert text.count("triton_kernel_call") >= (9 if decay == "vector" else 4)
    assert not [s for s in shapes if s.count(time) > 1]
    states = [np.prod(s) for s in shapes if s[-2:] == (K, V) and len(s) == 5]
    chunk = 16 if dtype == f32 else 32 if K > 128 else 64
    assert all(n <= rows * heads * K * V * time // (16 * chunk) for n in states)


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"K": 300}, "K=300; its kernels take 1 to 256"),
        ({"options": {"chunk_size": 8, "return_chunk_states": True}}, "chunk_size=8"),
    ],
)
def test_refusals_say_why(change, why):
    args = arguments(dataclasses.replace(SMALL, **change))
    with triton_calls.interpret(), pytest.raises(dispatch.UnsupportedError, match=why):
        linear_recurrence(**args, implementation="triton_gpu")
