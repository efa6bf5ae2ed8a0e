"""`test_time_memory`: chunks against the token loop in float64, borders to the bit, states, what the papers say must hold.

The comparisons are in float64 throughout: a layer norm or a Newton-Schulz iteration multiplies float32 rounding by
thousands. The mixers' suite has the same programs in float32.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mlt_kernels import dispatch, linear_recurrence
from mlt_kernels import test_time_memory as memory_op
from mlt_kernels.test_time_memory import (
    LM_NEWTON_SCHULZ,
    MUON_NEWTON_SCHULZ,
    MemorySpec,
    _network,
    _pieces,
    _products,
    initial_state,
)
from mlt_kernels.test_time_memory.cases import PUBLISHED, TESTS, arguments
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

BACKENDS = dispatch.backends("test_time_memory")
TOKENS = ("q", "k", "v", "step", "log_decay", "log_momentum", "threshold")
WITH_GRADIENTS = ("titans", "ttt_mlp", "lact")
"""The chunks' gradients are JAX's own; three cases go through every part that is not."""
EXACT = 1e-9
"""Without LLVM's optimization, which takes most of the time, where no bits are compared."""


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def split(case):
    """(function of the arrays that gives o and the final state, arrays in float64). The position is an array of its own."""
    made = arguments(case)
    spec = made.pop("spec")
    made = cast_floating(made, jnp.float64)
    if "initial_state" in made:
        made["position"] = made["initial_state"].position
        made["initial_state"] = made["initial_state"]._replace(position=None)

    def run(implementation, position=None, initial_state=None, **arrays):
        state = None if initial_state is None else initial_state._replace(position=position)
        made = memory_op(**arrays, spec=spec, initial_state=state, return_final_state=True, implementation=implementation)
        return made

    return run, made


@functools.cache
def values(name, backend):
    """Compiled: arguments -> (o, state)."""
    run, _ = split(TESTS[name])
    return jax.jit(lambda args: run(backend, **args))


@functools.cache
def gradients(name, backend):
    """Compiled: (arguments, cotangent) -> ((o, state), gradients)."""
    run, args = split(TESTS[name])
    wrt = [x for x in args if x not in ("segment_ids", "position")]
    both = lambda args, cts: value_and_grads(functools.partial(run, backend), args, wrt=wrt, cotangent=cts)  # noqa: E731
    return jax.jit(both)


def cotangent(name, args):
    return cotangents(jax.eval_shape(values(name, "reference"), args))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_values_and_gradients(name, backend):
    _, args = split(TESTS[name])
    cts = cotangent(name, args)
    assert_close(gradients(name, backend)(args, cts), gradients(name, "reference")(args, cts), max_rel=EXACT, what=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [name for name in TESTS if name not in (*WITH_GRADIENTS, "tnt_local")])
def test_values(name, backend):
    _, args = split(TESTS[name])
    assert_close(values(name, backend)(args), values(name, "reference")(args), max_rel=EXACT, what=name)


def test_tokens_of_16_bits():
    """Yaad is the steepest of the published memories: with 16-bit operands its gradients are off by their own size."""
    made = arguments(PUBLISHED["yaad"], dtype=jnp.bfloat16)
    spec, wrt = made.pop("spec"), [x for x in made if x != "segment_ids"]

    @functools.partial(jax.jit, static_argnums=0)
    def found(implementation, args):
        fn = functools.partial(memory_op, spec=spec, implementation=implementation)
        return value_and_grads(fn, args, wrt=wrt, cotangent=made["v"].astype(args["v"].dtype))

    assert_close(found("chunked", made), found("reference", cast_floating(made, jnp.float64)), max_rel=2e-2)


def test_products_of_two_halves():
    """16 digits of every operand, in values, gradients and gradients of gradients."""
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.standard_normal(shape)) for shape in ((2, 7, 9), (2, 9, 5)))

    def results(product, a, b):
        value = lambda a, b: jnp.sum(jnp.sin(product(a, b)))  # noqa: E731
        first = jax.grad(value, argnums=(0, 1))
        second = jax.grad(lambda a, b: sum(jnp.sum(jnp.cos(x)) for x in first(a, b)), argnums=(0, 1))
        return product(a, b), first(a, b), second(a, b)

    narrow = results(_products.in_halves, a.astype(jnp.float32), b.astype(jnp.float32))
    assert_close(narrow, results(jnp.matmul, a, b), max_rel=1e-4)


def test_accelerators_multiply_16_bit_tokens_in_16_bits():
    made = arguments(dataclasses.replace(PUBLISHED["ttt_mlp"], B=1, T=16), dtype=jnp.bfloat16)
    spec = made.pop("spec")

    def lowered(**changes):
        with dispatch.target_platform("gpu"):
            traced = jax.jit(lambda args: memory_op(**args, spec=spec)).trace(made | changes)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        return set(re.findall(r"dot_general .*: \(tensor<[x\d]*x(\w+)>, tensor<[x\d]*x(\w+)>\) -> tensor<[x\d]*x(\w+)>", text))

    assert lowered() == {("bf16", "bf16", "f32")}
    wide = {name: made[name].astype(jnp.float32) for name in ("q", "k", "v")}
    assert lowered(**wide) == {("f32", "f32", "f32")}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_documents_are_isolated_and_causal_to_the_bit(name, backend):
    run, args = split(TESTS[name])
    tokens = [t for t in TOKENS if t in args]
    fn, compiled = functools.partial(run, backend), gradients(name, backend)
    check_isolation(fn, args, np.asarray(args["segment_ids"]), token_arguments=tokens, compiled=compiled)
    cts = cotangent(name, args)
    first = lambda args: compiled(args, cts)[0][0]  # noqa: E731
    check_causality(fn, args, token_arguments=tokens, positions=(1, 10, 18, 27), compiled=first)


@functools.cache
def stepwise(name, backend):
    """Compiled: (7 tokens of one document, state) -> (o, state)."""
    spec = TESTS[name].spec
    return jax.jit(
        lambda args, state: memory_op(**args, spec=spec, initial_state=state, return_final_state=True, implementation=backend)
    )


def part(args, low, high):
    return {name: x[:, low:high] if name in TOKENS else x for name, x in args.items() if name != "segment_ids"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["lact", "tnt_local"])
def test_a_state_goes_on_in_the_middle_of_a_chunk(name, backend):
    """Four calls of seven tokens, on and off the borders of chunks and resets, give what one call gives."""
    run, args = split(dataclasses.replace(TESTS[name], state=False, documents=None, T=28))
    whole, last = jax.jit(functools.partial(run, "reference"))(**args)
    state = initial_state(args["memory"], TESTS[name].spec, 2, momentum=TESTS[name].momentum)
    outputs = []
    for low in range(0, 28, 7):
        o, state = stepwise(name, backend)(part(args, low, low + 7), state)
        outputs.append(o)
    assert_close(jnp.concatenate(outputs, axis=1), whole, max_rel=EXACT)
    assert_close(state, last, max_rel=EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_packed_document_runs_as_alone_and_padding_leaves_the_state(backend):
    _, args = split(TESTS["titans"])
    ids = np.r_[np.full(10, 1), np.full(7, 2), np.zeros(12)].astype(np.int32)
    packed = args | {"segment_ids": jnp.asarray(np.stack([ids, ids]))}
    o, last = gradients("titans", backend)(packed, cotangent("titans", packed))[0]
    alone = {name: x for name, x in part(args, 10, 17).items() if name not in ("initial_state", "position")}
    own, own_last = stepwise("titans", backend)(alone, initial_state(args["memory"], TESTS["titans"].spec, 2))
    assert_close(o[:, 10:17], own, max_rel=EXACT)
    assert_close(last, own_last, max_rel=EXACT)
    assert_same_bits(o[:, 17:], jnp.zeros_like(o[:, 17:]))


def linear_case(chunk_size, **options):
    case = dataclasses.replace(
        TESTS["tnt_local"],
        spec=MemorySpec(chunk_size=chunk_size, net="linear", **options),
        decay=options.get("loss") == "dot",
    )
    return split(case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_linear_memory_online_is_the_delta_rule(backend):
    run, args = linear_case(1)
    B = args["q"].shape[0]
    state = jnp.broadcast_to(args["memory"][0], (B, *args["memory"][0].shape))
    q, k, v = (args[x] for x in "qkv")
    # Every document starts from the learned memory, which the recurrence knows as an initial state: one document at a time.
    single = jnp.ones_like(args["segment_ids"])
    o, last = jax.jit(functools.partial(run, backend))(**(args | {"segment_ids": single}))
    options = {"beta": args["step"], "rule": "delta", "scale": 1.0, "initial_state": state, "return_final_state": True}
    wanted, wanted_last = linear_recurrence(q, k, v, **options, implementation="reference")
    assert_close([o, last.weights[0]], [wanted, wanted_last], max_rel=EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_where_gradients_do_not_depend_on_the_weights_no_chunk_does(backend):
    """Loss -f(k) . v of a linear memory: linear attention with a gate, whatever the chunk."""
    results = []
    for chunk_size in (4, 64):
        run, args = linear_case(chunk_size, loss="dot")
        args["memory"] = (0 * args["memory"][0],)
        results.append(jax.jit(functools.partial(run, backend))(**args))
    gates = {"beta": args["step"], "log_decay": args["log_decay"], "segment_ids": args["segment_ids"], "scale": 1.0}
    options = {**gates, "return_final_state": True, "implementation": "reference"}
    wanted, wanted_last = linear_recurrence(args["q"], args["k"], args["v"], **options)
    for o, last in results:
        assert_close([o, last.weights[0]], [wanted, wanted_last], max_rel=EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_mini_batch_of_a_linear_memory_is_its_closed_dual_form(backend):
    """o = q W - tril(tau_i eta_j q_i . k_j) (k W - v)."""
    run, args = linear_case(29, rule="mean")
    args.pop("segment_ids")
    args["row_weight"] = jnp.asarray(np.random.default_rng(0).random(29))
    o, last = jax.jit(functools.partial(run, backend))(**args)
    q, k, v, eta = (np.moveaxis(np.asarray(args[x]), 2, 1) for x in ("q", "k", "v", "step"))
    W, tau = np.asarray(args["memory"][0]), np.asarray(args["row_weight"])
    scores = np.tril(tau[:, None] * eta[:, :, None] * (q @ np.swapaxes(k, -2, -1)))
    assert_close(np.moveaxis(np.asarray(o), 2, 1), q @ W - scores @ (k @ W - v), max_rel=EXACT)
    assert_close(last.weights[0], W - tau[-1] * np.swapaxes(eta[..., None] * k, -2, -1) @ (k @ W - v), max_rel=EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_of_zero_changes_nothing_and_row_norms_stay(backend):
    _, args = split(TESTS["lact"])
    args["initial_state"] = initial_state(args["memory"], TESTS["lact"].spec, 2, momentum=True)._replace(position=None)
    args |= {"position": jnp.zeros((2,), jnp.int32), "segment_ids": jnp.ones_like(args["segment_ids"])}
    cts = cotangent("lact", args)
    _, moved = gradients("lact", backend)(args, cts)[0]
    _, still = gradients("lact", backend)(args | {"step": 0 * args["step"]}, cts)[0]
    for w, after, unmoved in zip(args["memory"], moved.weights, still.weights, strict=True):
        assert_close(unmoved, jnp.broadcast_to(w, unmoved.shape), max_rel=1e-4)
        assert_close(_network.unit_norms(after), jnp.broadcast_to(_network.unit_norms(w), (2, 2, 1, w.shape[2])), max_rel=1e-4)
        assert np.abs(np.asarray(after - unmoved)).max() > 0.1


def test_losses_have_the_signals_of_the_papers():
    rng = np.random.default_rng(0)
    y, v, d = rng.standard_normal((50, 5)), rng.standard_normal((50, 5)), rng.uniform(0.5, 4, 50)
    r = y - v
    size, d1 = np.linalg.norm(r, axis=1, keepdims=True), d[:, None]
    wanted = {
        ("l2", 2.0): 2 * r,
        ("dot", 1.0): -v,
        ("lp", 1.0): 3 * r * np.sqrt(r * r + 1e-6),
        ("huber_mix", 1.0): np.where(size <= d1, r, d1 * r / np.sqrt(r * r + 1e-6)),
        ("huber_norm", 1.0): np.where(size <= d1, r, d1 * r / size),
        ("huber_coord", 1.0): np.clip(r, -d1, d1),
    }
    for (name, scale), signal in wanted.items():
        spec = MemorySpec(chunk_size=1, loss=name, loss_scale=scale)
        signals = jax.grad(lambda y, v, d, spec=spec: jnp.sum(_network.loss(spec, y, v, d)))
        once_more = jax.grad(lambda y, v, d, signals=signals: jnp.sum(jnp.sin(signals(y, v, d))))
        both = jax.jit(lambda *args, signals=signals, once_more=once_more: (signals(*args), once_more(*args)))
        assert_close(both(y, v, d)[0], signal, max_rel=EXACT, what=name)
        assert np.isfinite(both(v, v, d)[1]).all(), name


def test_links():
    a = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 5)))
    norm = jnp.sum(jnp.abs(a) ** 4, axis=(1, 2), keepdims=True) ** 0.25

    def spec(link, **options):
        return MemorySpec(chunk_size=1, link=link, read="chunk", **options)

    def expose(a, link, **options):
        return jax.jit(functools.partial(_network.expose, spec(link, **options)))(a)

    assert_close(expose(a, "pnorm"), a / norm**2, max_rel=EXACT)
    assert_close(expose(_network.accumulator(spec("pnorm"), a), "pnorm"), a, max_rel=EXACT)
    assert_close(expose(a, "pnorm", link_power=2.0), a, max_rel=EXACT)
    # The gradient of |A|_4^2 / 2.
    half_square = jax.jit(jax.grad(lambda a: 0.5 * jnp.sum(jnp.sum(jnp.abs(a) ** 4, axis=(1, 2)) ** 0.5)))
    assert_close(expose(a, "mirror"), half_square(a), max_rel=EXACT)
    capped = expose(a * jnp.asarray([0.1, 1.0, 9.0])[:, None, None], "norm_cap", link_cap=2.0)
    assert_close(capped[0], 0.1 * a[0], max_rel=EXACT)
    assert_close(capped[2], 2.0 * (a / norm)[2], max_rel=EXACT)
    assert_close(expose(a, "softmax").sum(-1), jnp.ones((3, 4)), max_rel=EXACT)
    zeros = jax.jit(jax.grad(lambda a: jnp.sum(_network.expose(spec("pnorm"), a) ** 2)))(jnp.zeros((2, 4, 5)))
    assert np.isfinite(np.asarray(zeros)).all()


@pytest.mark.parametrize("table", [LM_NEWTON_SCHULZ, MUON_NEWTON_SCHULZ])
@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_newton_schulz_brings_singular_values_near_one(shape, table):
    g = np.random.default_rng(0).standard_normal((2, *shape))
    spec = MemorySpec(chunk_size=1, net="gated", rule="chunk", read="chunk", newton_schulz=table)
    u, _, vt = np.linalg.svd(g, full_matrices=False)
    found = np.asarray(_network.orthogonalize(spec, jnp.asarray(g)))
    along = np.einsum("bij,bik,bkj->bj", u, found, np.swapaxes(vt, 1, 2))
    assert along.min() > 0.5
    assert along.max() < 1.5


@pytest.mark.parametrize("chunk", [1, 2, 3, 8])
def test_every_token_has_a_place_in_a_piece(chunk):
    """Random documents, and the rows that need most pieces: one of one token, one of C + 1, again and again."""
    rng, T = np.random.default_rng(chunk), 40
    worst = np.resize(np.repeat([1, 2], [1, chunk + 1]), T)
    rows = [np.cumsum(np.r_[1, np.diff(worst) != 0]), np.arange(1, T + 1), np.ones(T, int)]
    rows += [np.cumsum(rng.random(T) < p) * (rng.random() < 0.9) for p in np.linspace(0.05, 0.9, 29)]
    ids = np.stack(rows).astype(np.int32)
    entered = rng.integers(0, 3 * chunk, len(ids)).astype(np.int32)
    spec = MemorySpec(chunk_size=chunk)
    cut = jax.jit(lambda ids, entered: _pieces.pieces(ids, entered, *ids.shape, spec))(ids, entered)
    token, home, place = (np.asarray(x) for x in (cut.token_JBC, cut.home_BT, cut.place_JBC))
    width, b = token.shape[2], np.arange(len(ids))[:, None]
    piece, slot = home // width, home % width
    np.testing.assert_array_equal(token[piece, b, slot], np.broadcast_to(np.arange(T), ids.shape))
    begins = np.concatenate([np.zeros((len(ids), 1), bool), ids[:, 1:] != ids[:, :-1]], axis=1)
    start = np.maximum.accumulate(np.where(begins, np.arange(T), 0), axis=1)
    position = np.arange(T) - start + np.where(start == 0, entered[:, None], 0)
    np.testing.assert_array_equal(place[piece, b, slot], position % chunk)
    # A piece of one document's chunk, or of whole documents from their starts.
    fresh = np.asarray(cut.fresh_JB)[piece, b]
    same = piece[:, 1:] == piece[:, :-1]
    assert (fresh[:, 1:] | ~begins[:, 1:] | ~same).all()
    assert (~same | begins[:, 1:] | (position[:, 1:] % chunk != 0)).all()
    inner = same & ~begins[:, 1:]
    assert (fresh[:, 1:][inner] == fresh[:, :-1][inner]).all()
    assert (position[fresh] < chunk).all()


def test_no_weights_of_a_token_exist():
    """Beside the state that enters each piece, nothing is as large as one memory a token."""
    T, C = 256, 16
    case = dataclasses.replace(TESTS["titans"], T=T, K=32, V=32, hidden=64, state=False, spec=MemorySpec(chunk_size=C))
    run, args = split(case)
    wrt = [x for x in args if x != "segment_ids"]
    shapes = array_shapes_in(lambda args: value_and_grads(functools.partial(run, "chunked"), args, wrt=wrt), args)
    memory = 2 * 2 * 32 * 64
    assert max(np.prod(s) for s in shapes) <= _pieces.bound(T, C, True) * memory


def test_wrong_arguments_are_named():
    case = TESTS["titans"]
    args = arguments(dataclasses.replace(case, state=False))
    with pytest.raises(ValueError, match=r"log_momentum=None; expected an array with rule='momentum'"):
        memory_op(**(args | {"log_momentum": None}))
    with pytest.raises(ValueError, match=r"threshold with rule='momentum', loss='l2'.*expected None"):
        memory_op(**args, threshold=args["step"])
    with pytest.raises(ValueError, match=r"memory\[1\] has shape \(2, 7, 6\); expected \(2, 8, 6\)"):
        memory_op(**(args | {"memory": (args["memory"][0], args["memory"][1][:, :7])}))
    with pytest.raises(ValueError, match="memory has 1 matrices; expected at least 2 with net='mlp'"):
        memory_op(**(args | {"memory": args["memory"][:1]}))
    state = initial_state(args["memory"], case.spec, 2)._replace(anchor=())
    with pytest.raises(ValueError, match=r"initial_state.anchor has 0 matrices; expected 2"):
        memory_op(**args, initial_state=state)
    with pytest.raises(ValueError, match="reset_every=6; expected 0 or a multiple of chunk_size=4"):
        MemorySpec(chunk_size=4, reset_every=6)
    with pytest.raises(ValueError, match="read='token' with rule='chunk'"):
        MemorySpec(chunk_size=4, rule="chunk")
    with pytest.raises(ValueError, match="rule='moment'; expected one of 'descent', 'momentum', 'mean', 'chunk'"):
        MemorySpec(chunk_size=4, rule="moment")
