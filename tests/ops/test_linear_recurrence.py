"""`linear_recurrence`: every backend against the float64 token loop, borders to the bit, hard gates and keys, identities."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mlt_kernels import dispatch, linear_recurrence, testing
from mlt_kernels.linear_recurrence.cases import TESTS, arguments, one_key
from mlt_kernels.testing import (
    array_shapes_in,
    assert_close,
    assert_same_bits,
    cast_floating,
    check_causality,
    check_isolation,
    cotangents,
    evaluate,
    value_and_grads,
)

BACKENDS = tuple(name for name in dispatch.backends("linear_recurrence") if name in dispatch.PORTABLE)
STATIC = ("rule", "normalizer", "chunk_size")
TOKENS = ("q", "k", "v", "log_decay", "beta", "log_input")
PACKED = [name for name, case in TESTS.items() if case.documents is not None]


def split(case, **kwargs):
    """(function of the array arguments that gives o and the final state, array arguments)."""
    made = arguments(case, **kwargs)
    static = {name: made.pop(name) for name in STATIC if name in made}
    return functools.partial(linear_recurrence, return_final_state=True, **static), made


def wrt(args):
    return tuple(name for name in args if name != "segment_ids")


@functools.cache
def compiled(name, backend):
    """(arguments, cotangent) -> (o and state, gradients), compiled once a case and backend."""
    fn = functools.partial(split(TESTS[name])[0], implementation=backend)
    return jax.jit(lambda args, cts: value_and_grads(fn, args, wrt=wrt(args), cotangent=cts))


def result_and_grads(name, backend, args):
    fn, _ = split(TESTS[name])
    shapes = jax.eval_shape(lambda args: fn(**args), args)
    return jax.tree.map(np.asarray, compiled(name, backend)(args, cotangents(shapes)))


def oracle(name, args):
    with jax.enable_x64(True):
        return result_and_grads(name, "reference", cast_floating(args, jnp.float64))


def check(name, backend, args, what=""):
    assert_close(result_and_grads(name, backend, args), oracle(name, args), max_rel=1e-5, what=what or name)


@pytest.mark.parametrize("backend", BACKENDS, scope="module")
@pytest.mark.parametrize("name", TESTS, scope="module")
def test_values_and_gradients(backend, name):
    _, args = split(TESTS[name])
    check(name, backend, args)


@pytest.mark.parametrize("backend", BACKENDS, scope="module")
@pytest.mark.parametrize("name", PACKED, scope="module")
def test_documents_are_isolated_to_the_bit(backend, name):
    fn, args = split(TESTS[name])
    tokens = [t for t in TOKENS if t in args]
    check_isolation(fn, args, np.asarray(args["segment_ids"]), token_arguments=tokens, compiled=compiled(name, backend))


@pytest.mark.parametrize("backend", BACKENDS, scope="module")
@pytest.mark.parametrize("name", TESTS, scope="module")
def test_causal_to_the_bit(backend, name):
    fn, args = split(TESTS[name])
    cts = cotangents(jax.eval_shape(lambda args: fn(**args), args))
    tokens = [t for t in TOKENS if t in args and args[t].ndim > 1]
    check_causality(
        fn, args, token_arguments=tokens, positions=(1, 16, 30, 52), compiled=lambda a: compiled(name, backend)(a, cts)[0][0]
    )


@pytest.mark.parametrize("backend", BACKENDS, scope="module")
@pytest.mark.parametrize("name", TESTS, scope="module")
def test_hard_inputs(backend, name):
    """Each to 1e-5 in every value and gradient."""
    case = TESTS[name]
    _, args = split(case)
    k, options = args["k"], case.options
    inputs = {"zero keys": {"k": k.at[:, 3:20].set(0)}}
    if "log_decay" in args:
        gates = args["log_decay"]
        inputs["decays down to -60"] = split(dataclasses.replace(case, strongest=-60.0))[1]
        # Beyond, a normalised sum is over one token alone and has no gradient to compare.
        strongest = -100.0 if case.log_input else -1000.0
        inputs["decays beyond float32"] = split(dataclasses.replace(case, strongest=strongest))[1]
        # Small gradients everywhere: nothing large may cancel in them. Divided by its sum, a read is then all but one value
        # and its gradient in q is what cancelling leaves (1e-5 off in the float32 token loop at -9), hence the milder decay.
        alike = -4.0 if options.get("normalizer") == "sum" else -9.0
        inputs["all tokens forget alike"] = {"log_decay": jnp.full_like(gates, alike)}
        if case.decay == "scalar":
            # One float32 running sum would have lost the last digits of the mild ones.
            strong = np.where(np.arange(case.T)[:, None] % 16 < 5, -60.0, -0.01)
            inputs["mild decays after strong ones"] = {"log_decay": jnp.full_like(gates, 1) * jnp.asarray(strong, gates.dtype)}
    if options.get("rule") == "delta":
        ones = jnp.ones_like(args["beta"])
        inputs |= {f"beta {x}": {"beta": x * ones} for x in (0.0, 1.0, 2.0)}
        # At full reflection nothing damps a rounding error, and the solve must add next to none of its own.
        for spread in (0.0, 0.1):
            one = k[:, :1] + spread * k
            one = jnp.broadcast_to(one / jnp.linalg.norm(one, axis=-1, keepdims=True), k.shape)
            inputs[f"one key, spread {spread}"] = {"k": one, "beta": 2 * ones}
    if case.log_input:
        # Next to much smaller inputs a state that is not empty would leave no gradient to compare.
        mild = {"q": abs(args["q"]), "k": abs(k), "initial_state": jax.tree.map(jnp.zeros_like, args["initial_state"])}
        inputs |= {f"input gates near {x}": mild | {"log_input": 5 * args["log_input"] + x} for x in (30.0, -30.0)}
    for what, changed in inputs.items():
        check(name, backend, args | changed, what=f"{name}, {what}: ")


@pytest.mark.parametrize(("name", "T"), [("gated_delta", 1), ("gla", 15), ("gated_delta", 16), ("gla", 17), ("gated_delta", 17)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths(backend, name, T):
    fn, args = split(dataclasses.replace(TESTS[name], T=T, options=TESTS[name].options | {"chunk_size": 16}))
    found = jax.jit(lambda args: fn(**args, implementation=backend))(args)
    with jax.enable_x64(True):
        wanted = jax.tree.map(np.asarray, fn(**cast_floating(args, jnp.float64), implementation="reference"))
    assert_close(found, wanted, max_rel=1e-5)


@pytest.mark.parametrize(("name", "chunk_size"), [("ssd", 1), ("kda", 4), ("gated_delta", 64), ("kda", 64)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_chunk_sizes(backend, name, chunk_size):
    fn, args = split(TESTS[name])
    fn = functools.partial(fn, implementation=backend, return_chunk_states=True)
    o, last, entering = jax.jit(lambda args: fn(**(args | {"chunk_size": chunk_size})))(args)
    (wanted, wanted_last), _ = oracle(name, args)
    assert_close([o, last], [wanted, wanted_last], max_rel=1e-5)
    assert entering.shape == (2, -(-53 // chunk_size), 4, 8, 12)
    assert_same_bits(entering[:, 0], args["initial_state"])


@pytest.mark.parametrize("name", ["ssd", "gated_delta"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_operands(backend, name):
    """Operands of 16 bits, gates and states of 32: within 2 % of the same numbers computed in float64."""
    fn, args = split(TESTS[name])
    low = args | {x: args[x].astype(jnp.bfloat16) for x in ("q", "k", "v")}
    found = jax.jit(lambda args: value_and_grads(functools.partial(fn, implementation=backend), args))(low)
    assert found[0][0].dtype == jnp.bfloat16
    assert found[0][1].dtype == jnp.float32
    assert_close(found, oracle(name, low), max_rel=2e-2)


@pytest.mark.parametrize(
    ("decay", "dtype", "limit"),
    [("none", "float32", 1e-5), *[(decay, "bfloat16", 2e-2) for decay in ("none", "scalar", "vector")]],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_key_in_every_token(backend, decay, dtype, limit):
    """Writes cancel from token to token, and nothing damps what rounding puts into a product or an overlap of keys.

    With decays in float32, a unit in the last place of the inputs moves the float64 result by as much as the limit.
    """
    args = one_key(decay, dtype=dtype) | {"rule": "delta", "return_final_state": True}
    assert_close(evaluate(linear_recurrence, backend, args), testing.oracle(linear_recurrence, args), max_rel=limit)


@pytest.mark.parametrize("name", ["gated_delta", "mlstm"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_goes_on(backend, name):
    fn, args = split(dataclasses.replace(TESTS[name], documents=None))
    fn = jax.jit(functools.partial(fn, implementation=backend))
    whole, last = fn(**args)
    cut = {t: (args[t][:, :20], args[t][:, 20:]) for t in TOKENS if t in args}
    first, state = fn(**(args | {t: x[0] for t, x in cut.items()}))
    second, end = fn(**(args | {t: x[1] for t, x in cut.items()} | {"initial_state": state}))
    assert_close(jnp.concatenate([first, second], axis=1), whole, max_rel=1e-5)
    assert_close(end, last, max_rel=1e-5)


@pytest.mark.parametrize("name", ["kda", "mlstm"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_documents_run_like_separate_ones(backend, name):
    """Padding leaves the state, so the final state of a padded row is that of its last document."""
    fn, args = split(dataclasses.replace(TESTS[name], state=False))
    fn = jax.jit(functools.partial(fn, implementation=backend))
    args["segment_ids"] = jnp.asarray(np.r_[np.full(21, 1), np.full(20, 2), np.zeros(12)].astype(np.int32))[None].repeat(2, 0)
    o, last = fn(**args)
    alone = {t: args[t][:, 21:41] for t in TOKENS if t in args}
    own, own_last = fn(**alone)
    assert_close(o[:, 21:41], own, max_rel=1e-5)
    assert_close(last, own_last, max_rel=1e-5)
    assert_same_bits(o[:, 41:], jnp.zeros_like(o[:, 41:]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_decay_is_a_reset(backend):
    fn, args = split(TESTS["gated_delta"])
    start = np.arange(53) % 11 == 5
    one = jnp.ones((2, 53), jnp.int32)
    marked = one + jnp.asarray(np.cumsum(start), jnp.int32)
    gates = jnp.where(jnp.asarray(start)[:, None], -jnp.inf, args["log_decay"])
    run = jax.jit(functools.partial(fn, implementation=backend))
    by_gate = run(**(args | {"segment_ids": one, "log_decay": gates}))
    by_segments = run(**(args | {"segment_ids": marked}))
    assert_close(by_gate, by_segments, max_rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_identities(backend):
    """beta = 0 writes nothing; a vector decay equal in all dims is a scalar one; the delta rule reads back its write."""
    fn, args = split(TESTS["gated_delta"])
    run = jax.jit(functools.partial(fn, implementation=backend))
    B, T, H = args["log_decay"].shape
    vector = jnp.broadcast_to(args["log_decay"][..., None], (B, T, H, args["k"].shape[-1]))
    assert_close(run(**(args | {"log_decay": vector})), run(**args), max_rel=1e-5)

    nothing = args | {"beta": jnp.zeros_like(args["beta"]), "segment_ids": jnp.ones((B, T), jnp.int32)}
    _, last = run(**nothing)
    decayed = args["initial_state"] * jnp.exp(args["log_decay"].sum(1))[..., None, None]
    assert_close(last, decayed, max_rel=1e-5)

    one = nothing | {"beta": jnp.ones_like(args["beta"]), "q": args["k"], "log_decay": args["log_decay"]}
    o, _ = jax.jit(functools.partial(fn, implementation=backend, scale=1.0))(**one)
    assert_close(o, args["v"], max_rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_input_gate_offset_cancels(backend):
    """Where |n . q| > 1, adding a constant to every log input changes nothing."""
    fn, args = split(dataclasses.replace(TESTS["mlstm"], state=False, positive=True, documents=None))
    run = jax.jit(functools.partial(fn, implementation=backend))
    o, _ = run(**(args | {"log_input": args["log_input"] + 8}))
    shifted, _ = run(**(args | {"log_input": args["log_input"] + 11}))
    assert_close(shifted, o, max_rel=1e-5)


@pytest.mark.parametrize("name", ["kda", "gla", "ssd"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_array_of_chunk_by_chunk_by_key(backend, name):
    C, K = 64, 32
    fn, args = split(dataclasses.replace(TESTS[name], T=256, K=K, V=16, options=TESTS[name].options | {"chunk_size": C}))
    loss = functools.partial(fn, implementation=backend)
    shapes = array_shapes_in(lambda args: value_and_grads(loss, args, wrt=wrt(args)), args)
    largest_per_chunk = max(np.prod(s[s.index(C) :]) for s in shapes if C in s)
    assert largest_per_chunk < C * C * K
    assert not [s for s in shapes if s.count(C) >= 2 and K in s[s.index(C) :][1:]]


def test_memory_is_linear_in_tokens():
    """The largest array holds tokens or chunk states, never tokens by tokens."""
    fn, args = split(dataclasses.replace(TESTS["gated_delta"], T=1024, options={"rule": "delta", "chunk_size": 16}))
    shapes = array_shapes_in(lambda args: value_and_grads(fn, args, wrt=wrt(args)), args)
    B, T, H, V = args["v"].shape
    states = B * H * (T // 16) * 8 * V
    assert max(np.prod(s) for s in shapes) <= max(states, B * T * H * 16)


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("name", ["ssd", "gated_delta"])
def test_memory_beside_inputs_and_results(name, B):
    """Forward and backward keep one state a chunk, an eighth here; a copy of any token array would be another eighth."""
    options = TESTS[name].options | {"chunk_size": 64}
    case = dataclasses.replace(TESTS[name], B=B, T=8192, Hk=2, H=2, K=64, V=64, documents=None, options=options)
    fn, args = split(case)
    fn = functools.partial(fn, implementation="chunked")
    shapes = jax.eval_shape(lambda args: fn(**args), args)
    compiled = jax.jit(lambda args, cts: value_and_grads(fn, args, cotangent=cts)).lower(args, shapes).compile()
    memory = compiled.memory_analysis()
    inputs_and_results = memory.argument_size_in_bytes + memory.output_size_in_bytes
    assert memory.temp_size_in_bytes < 0.2 * inputs_and_results


def test_wrong_arguments_are_named():
    _, args = split(TESTS["gated_delta"])
    q, k, v = args["q"], args["k"], args["v"]
    with pytest.raises(ValueError, match=r"k has shape \(2, 53, 2, 7\); expected \(B, T, Hk, K\) with B=2 from q"):
        linear_recurrence(q, k[..., :7], v)
    with pytest.raises(ValueError, match=r"Hk=2 \(of q\) must divide H=3 \(of v\)"):
        linear_recurrence(q, k, v[:, :, :3])
    with pytest.raises(ValueError, match="rule='dleta'; expected one of 'add', 'delta'"):
        linear_recurrence(q, k, v, rule="dleta")
    with pytest.raises(ValueError, match="chunk_size=48; expected a power of two"):
        linear_recurrence(q, k, v, chunk_size=48)
    with pytest.raises(ValueError, match="log_decay has shape"):
        linear_recurrence(q, k, v, log_decay=jnp.zeros((2, 53, 3)))
    with pytest.raises(TypeError, match="segment_ids has dtype float32; expected integer"):
        linear_recurrence(q, k, v, segment_ids=jnp.ones((2, 53)))
    with pytest.raises(ValueError, match="normalizer='sum' with rule='delta'"):
        linear_recurrence(q, k, v, rule="delta", normalizer="sum")
    with pytest.raises(TypeError, match="initial_state must be a NormalizedState"):
        linear_recurrence(q, k, v, normalizer="sum", initial_state=args["initial_state"])
    with pytest.raises(ValueError, match="rule='both'"):
        jax.jit(lambda q: linear_recurrence(q, k, v, rule="both"))(q)
