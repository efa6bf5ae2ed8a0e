"""The add rule's Pallas kernels, interpreted: float64 oracle, borders to the bit, programs for accelerators that are not here."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mlt_kernels import dispatch, linear_recurrence, pallas
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
    "vector": dataclasses.replace(SMALL, decay="vector"),
    "mlstm": dataclasses.replace(SMALL, log_input=True, beta=False, options={"normalizer": "mlstm"}),
}
RUNS = {f"gpu {name}": (case, "pallas_gpu") for name, case in CASES.items()}
RUNS |= {f"tpu {name}": (CASES[name], "pallas_tpu") for name in ("states", "vector")}
DECAYED = [name for name, (case, _) in RUNS.items() if case.decay != "none"]


def split(case):
    """(function of the array arguments that gives o, the final state and so on, array arguments)."""
    made = arguments(case)
    static = {name: made.pop(name) for name in STATIC if name in made}
    made["segment_ids"] = jnp.asarray(SEGMENTS)
    return functools.partial(linear_recurrence, return_final_state=True, **static), made


def wrt(args):
    return tuple(name for name in args if name != "segment_ids")


@functools.cache
def compiled(name):
    """(arguments, cotangent) -> (results, gradients), interpreted and compiled once."""
    case, backend = RUNS[name]
    fn = functools.partial(split(case)[0], implementation=backend)
    return jax.jit(lambda args, cts: value_and_grads(fn, args, wrt=wrt(args), cotangent=cts))


def found(name, args):
    fn, _ = split(RUNS[name][0])
    cts = cotangents(jax.eval_shape(lambda args: fn(**args, implementation="reference"), args))
    with pallas.interpret():
        return jax.tree.map(np.asarray, compiled(name)(args, cts))


@functools.cache
def compiled_oracle(case):
    fn = functools.partial(split(CASES[case])[0], implementation="reference")
    return jax.jit(lambda args: value_and_grads(fn, args, wrt=wrt(args)))


def oracle(name, args):
    with jax.enable_x64(True):
        args = cast_floating(args, jnp.float64)
        return jax.tree.map(np.asarray, compiled_oracle(name.split()[1])(args))


@pytest.mark.parametrize("name", RUNS)
def test_values_and_gradients(name):
    _, args = split(RUNS[name][0])
    assert_close(found(name, args), oracle(name, args), max_rel=1e-5, what=name)


@pytest.mark.parametrize("name", DECAYED)
def test_strong_decays(name):
    """Down to -60; and all alike, where every gradient is small and none may be a small difference of large numbers."""
    case, _ = RUNS[name]
    _, args = split(case)
    strong = split(dataclasses.replace(case, strongest=-60.0))[1]["log_decay"]
    for gates in (strong, jnp.full_like(strong, -9.0)):
        changed = args | {"log_decay": gates}
        assert_close(found(name, changed), oracle(name, changed), max_rel=1e-5, what=name)


@pytest.mark.parametrize("name", RUNS)
def test_documents_are_isolated_to_the_bit(name):
    fn, args = split(RUNS[name][0])
    tokens = [t for t in TOKENS if t in args and args[t].ndim > 1]
    fn = functools.partial(fn, implementation="reference")
    documents = [(0, 2), (0, 4), (0, 6), (1, 1)]
    with pallas.interpret():
        check_isolation(fn, args, SEGMENTS, token_arguments=tokens, documents=documents, compiled=compiled(name))


@pytest.mark.parametrize("name", RUNS)
def test_padding_writes_nothing_and_keeps_the_state(name):
    """A row of padding gives o = 0 and its initial state back, and no input there has a gradient."""
    _, args = split(RUNS[name][0])
    (o, final, *_), grads = found(name, args)
    padding = SEGMENTS == 0
    assert_same_bits(o[padding], np.zeros_like(o[padding]))
    entering = args.get("initial_state", jax.tree.map(jnp.zeros_like, final))
    assert_same_bits(*(jax.tree.map(lambda x: x[2], state) for state in (final, entering)))
    for token in TOKENS:
        if token in grads and grads[token].ndim > 1:
            assert_same_bits(grads[token][padding], np.zeros_like(grads[token][padding]), what=token)


@pytest.mark.parametrize("backend", ["pallas_gpu", "pallas_tpu"])
def test_a_bare_call(backend):
    """No documents, a constant decay a head, the rest left out, a row that is no whole number of chunks."""
    args = arguments(dataclasses.replace(SMALL, B=1, T=21, decay="head", beta=False, state=False))

    def run(args, implementation):
        return value_and_grads(functools.partial(linear_recurrence, implementation=implementation), args)

    with pallas.interpret():
        got = jax.jit(functools.partial(run, implementation=backend))(args)
    with jax.enable_x64(True):
        want = jax.jit(functools.partial(run, implementation="reference"))(cast_floating(args, jnp.float64))
        want = jax.tree.map(np.asarray, want)
    assert_close(got, want, max_rel=1e-5)


def test_bfloat16_operands():
    """Operands of 16 bits, gates and states of 32: within 2 % of the same numbers computed in float64."""
    _, args = split(CASES["states"])
    low = args | {x: args[x].astype(jnp.bfloat16) for x in ("q", "k", "v")}
    results, grads = found("gpu states", low)
    assert results[0].dtype == grads["q"].dtype == grads["v"].dtype == jnp.bfloat16
    assert results[1].dtype == grads["log_decay"].dtype == jnp.float32
    assert_close((results, grads), oracle("gpu states", low), max_rel=2e-2)


STD = Case(B=8, T=4096, Hk=16, H=32, K=128, V=128, documents=None)
LOWERED = {
    "scalar": (STD, "cuda"),
    "vector": (dataclasses.replace(STD, decay="vector"), "cuda"),
    "none, K 256": (dataclasses.replace(STD, K=256, V=64, decay="none", beta=False, state=False), "cuda"),
    "tpu": (STD, "tpu"),
    "tpu ssd": (dataclasses.replace(STD, V=64, beta=False, state=False), "tpu"),
}


def abstract(case, dtype):
    """The arguments of a real size, of which no number is made."""
    tiny = arguments(dataclasses.replace(case, B=1, T=1, Hk=1, H=1), dtype=dtype)
    sizes = {"q": case.Hk, "k": case.Hk}
    shapes = {}
    for name, x in tiny.items():
        shape = list(x.shape)
        shape[:2] = (case.B, case.H) if name == "initial_state" else (case.B, case.T)
        if name != "initial_state" and x.ndim > 2:
            shape[2] = sizes.get(name, case.H)
        shapes[name] = jax.ShapeDtypeStruct(tuple(shape), x.dtype)
    return shapes | {"segment_ids": jax.ShapeDtypeStruct((case.B, case.T), jnp.int32)}


def with_gradients(backend):
    def fn(args):
        run = functools.partial(linear_recurrence, implementation=backend, return_final_state=True)
        return value_and_grads(run, args, wrt=wrt(args), cotangent=jax.tree.map(jnp.ones_like, run(**args)))

    return fn


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, jnp.bfloat16) for name in LOWERED), *((name, jnp.float32) for name in ("scalar", "vector", "tpu"))],
)
def test_programs_lower_for_devices_that_are_not_here(name, dtype):
    case, platform = LOWERED[name]
    kind, host, call = ("NVIDIA H200", "gpu", "triton") if platform == "cuda" else ("TPU v5e", "tpu", "tpu_custom_call")
    with pallas.target_device(kind, platform=host):
        traced = jax.jit(with_gradients(f"pallas_{host}")).trace(abstract(case, dtype))
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count(call) >= (4 if platform == "cuda" else 3)


@pytest.mark.parametrize("name", LOWERED)
def test_states_are_stored_at_anchors_alone(name):
    """No (T, T), no (C, C, K), and states of one chunk in sixteen at most."""
    case, platform = LOWERED[name]
    backend = "pallas_gpu" if platform == "cuda" else "pallas_tpu"
    kind = "NVIDIA H200" if platform == "cuda" else "TPU v5e"
    with pallas.target_device(kind, platform=backend[-3:]):
        shapes = array_shapes_in(with_gradients(backend), abstract(case, jnp.bfloat16))
    chunk = 16 if case.decay == "vector" else 64
    assert not [s for s in shapes if s.count(case.T) > 1]
    assert not [s for s in shapes if s[-3:] in ((16, 16, case.K), (64, 64, case.K))]
    states = [np.prod(s) for s in shapes if s[-2:] == (case.K, case.V) and len(s) == 5]
    assert all(n <= case.B * case.H * case.K * case.V * case.T // (16 * chunk) for n in states)


def test_why_not():
    """A named backend that cannot run says why, on what was asked for."""
    args = arguments(dataclasses.replace(SMALL, K=24))
    with pallas.interpret(), pytest.raises(dispatch.UnsupportedError, match="K=24; a Triton kernel takes powers of two"):
        linear_recurrence(**args, implementation="pallas_gpu")
    with pytest.raises(dispatch.UnsupportedError, match="its kernels are for tpu; planned for cpu"):
        linear_recurrence(**args, implementation="pallas_tpu")


@pytest.mark.parametrize("rule", ["add", "delta"])
@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_a_batch_that_no_grid_holds_is_refused(platform, rule):
    def plan(rows):
        args = {name: jax.ShapeDtypeStruct((rows, 32, 1, 16), jnp.float32) for name in ("q", "k", "v")}
        with dispatch.target_platform(platform):
            jax.eval_shape(lambda args: linear_recurrence(**args, rule=rule, implementation=f"pallas_{platform}"), args)

    with pytest.raises(dispatch.UnsupportedError, match="nothing to compute"):
        plan(0)
    if (platform, rule) == ("gpu", "add"):  # the other kernels have the rows in front, where a grid is long
        with pytest.raises(dispatch.UnsupportedError, match="65536 rows; a grid holds 65535"):
            plan(65536)
