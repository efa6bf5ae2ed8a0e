"""Product-key memory: exact search, pooling, gate, gradients of table and keys."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mlt_kernels.testing import assert_close, assert_same_bits, check_isolation, positions, segment_ids

from mlt.mixers.base import BuildInfo, Context
from mlt.mixers.channel.product_key_memory import ProductKeyMemory
from mlt.mixers.product_keys import best_pairs
from mlt.model.block import Block
from mlt.model.count import count as count_model
from mlt.model.lm import LMConfig
from mlt.model.remat import Remat
from mlt.model.stack import Stack
from mlt.nn.param import initialize
from mlt.parallel.rules import Rules

D = 16
INFO = BuildInfo(d_model=D, num_sub_layers=4, vocab_size=64)
GATED = ProductKeyMemory(num_keys=24, num_selected=5, num_heads=3, key_dim=12, value_dim=10)
# One head that keeps every row: half lists shorter than num_selected, and a softmax over the whole table.
WHOLE = ProductKeyMemory(num_keys=4, num_selected=16, num_heads=1, key_dim=8, value_dim=6, gated=False)

run = jax.jit(lambda mixer, x, ctx: mixer(x, ctx)[0])


@jax.jit
def run_gradients(mixer, x, ctx):
    def total(mixer, x):
        y = mixer(x, ctx)[0]
        return (jnp.where(ctx.is_token[..., None], y, 0.0) ** 2).sum(), y

    return jax.value_and_grad(total, (0, 1), has_aux=True)(mixer, x)


def inputs(batch=2, length=19, seed=0, padding=True, dtype=jnp.float32):
    segments = segment_ids(seed, batch, length, padding=padding)
    x = np.random.default_rng(seed).standard_normal((batch, length, D)).astype(np.float32)
    ids = jnp.zeros(segments.shape, jnp.int32)
    return jnp.asarray(x, dtype), Context(ids, jnp.asarray(segments), jnp.asarray(positions(segments)), Rules(), True)


def plain(mixer, x, is_token):
    """Scores of all N rows, the K best by threshold, a softmax over the whole table with the rest left out."""
    config = mixer.config
    q = jnp.einsum("btd,dhk->bthk", x, mixer.query.kernel[...])
    q = q / jnp.sqrt((q**2).mean(-1, keepdims=True) + 1e-6) * mixer.query_norm.scale[...]
    first, second = mixer.keys[...]
    keys = jnp.concatenate([jnp.repeat(first, config.num_keys, axis=1), jnp.tile(second, (1, config.num_keys, 1))], axis=-1)
    scores = jnp.einsum("bthk,hnk->bthn", q, keys)
    least = jnp.sort(scores, axis=-1)[..., -config.num_selected, None]
    weights = jax.nn.softmax(jnp.where(scores >= least, scores, -jnp.inf), axis=-1).sum(2)
    y = jnp.where(is_token[..., None], weights, 0.0) @ mixer.values[...]
    if mixer.gate is not None:
        y = y * jax.nn.silu(x @ mixer.gate.kernel[...])
    return y if mixer.output is None else y @ mixer.output.kernel[...], weights


@pytest.mark.parametrize("count", [1, 32, 1024])
def test_search_equals_brute_force(count):
    size = 32
    first, second = np.random.default_rng(count).standard_normal((2, 6, size)).astype(np.float32)
    scores, ids = jax.jit(best_pairs, static_argnums=2)(first, second, count)
    table = (first[:, :, None] + second[:, None, :]).reshape(6, -1)
    order = np.argsort(-table, axis=-1, kind="stable")[:, :count]
    np.testing.assert_array_equal(scores, np.take_along_axis(table, order, axis=-1))
    np.testing.assert_array_equal(np.sort(ids, axis=-1), np.sort(order, axis=-1))


def test_search_scores_only_pairs_that_can_win():
    for count, pairs in {16: 50, 32: 119, 64: 280, 128: 645}.items():
        shapes = jax.make_jaxpr(lambda a, b: best_pairs(a, b, count))(jnp.zeros(512), jnp.zeros(512)).jaxpr.eqns  # noqa: B023
        joined = [eqn.outvars[0].aval.shape for eqn in shapes if eqn.primitive.name == "concatenate"]
        assert (pairs,) in joined
        assert sum((a + 1) * (b + 1) <= count for a, b in itertools.product(range(count), repeat=2)) == pairs


@pytest.mark.parametrize("config", [GATED, WHOLE], ids=["gated", "whole"])
def test_values_and_gradients_match_scores_of_every_row(config):
    mixer = initialize(config.build(INFO), 0)
    x, ctx = inputs()
    is_token = np.asarray(ctx.is_token)

    def dense(mixer, x):
        y, weights = plain(mixer, x, is_token)
        return (jnp.where(is_token[..., None], y, 0.0) ** 2).sum(), (y, weights)

    with jax.enable_x64(True):
        exact = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), (mixer, x))
        grads, (y, weights) = jax.tree.map(np.asarray, jax.jit(jax.grad(dense, (0, 1), has_aux=True))(*exact))
    (_, got_y), got_grads = run_gradients(mixer, x, ctx)
    assert_close(np.asarray(got_y)[is_token], y[is_token], max_rel=2e-6)
    for (path, want), got in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(got_grads), strict=True):
        assert_close(got, want, max_rel=5e-6, what=jax.tree_util.keystr(path))
    unread = (weights[is_token] == 0).all(0)
    assert config is WHOLE or unread.any()
    np.testing.assert_array_equal(np.asarray(got_grads[0].values[...])[unread], 0.0)


def test_rows_may_be_stored_in_another_order():
    mixer = initialize(GATED.build(INFO), 0)
    x, ctx = inputs()
    y = run(mixer, x, ctx)
    rng = np.random.default_rng(0)
    n = GATED.num_keys
    first, second = rng.permutation(n), rng.permutation(n)
    mixer.keys = mixer.keys.replace(jnp.stack([mixer.keys[0][:, first], mixer.keys[1][:, second]]))
    mixer.values = mixer.values.replace(mixer.values[...].reshape(n, n, -1)[first][:, second].reshape(n * n, -1))
    assert_close(run(mixer, x, ctx), y, max_rel=1e-6)


def test_heads_that_read_the_same_row_add_up():
    config = ProductKeyMemory(num_keys=2, num_selected=1, num_heads=3, key_dim=4, value_dim=D, gated=False)
    mixer = initialize(config.build(INFO), 0)
    mixer.keys = mixer.keys.replace(jnp.zeros_like(mixer.keys[...]))
    x, ctx = inputs(padding=False)
    assert_close(run(mixer, x, ctx), jnp.broadcast_to(3 * mixer.values[0], x.shape), max_rel=1e-6)


def test_padding_reads_no_row():
    mixer = initialize(GATED.build(INFO), 0)
    x, ctx = inputs(seed=2)
    padding = ~np.asarray(ctx.is_token)
    assert padding.any()
    assert not np.asarray(run(mixer, x, ctx))[padding].any()

    pulled = jax.jit(jax.grad(lambda mixer, x: mixer(x, ctx)[0].sum()))
    before, after = pulled(mixer, x), pulled(mixer, jnp.where(ctx.is_token[..., None], x, 9.0))
    assert_same_bits(after.values[...], before.values[...])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_documents_are_isolated_to_the_bit(dtype):
    mixer = initialize(GATED.build(INFO), 0)
    x, ctx = inputs(length=40, seed=3, dtype=dtype)
    check_isolation(lambda x: mixer(x, ctx)[0], {"x": x}, np.asarray(ctx.segment_ids), token_arguments=("x",))


def test_bfloat16_stays_near_float32():
    mixer = initialize(WHOLE.build(INFO), 0)
    x, ctx = inputs(dtype=jnp.bfloat16)
    y, exact = run(mixer, x, ctx), run(mixer, x.astype(jnp.float32), ctx)
    assert y.dtype == jnp.bfloat16
    assert_close(y, exact, max_rel=2e-2)


def test_no_tokens_at_all():
    mixer = initialize(GATED.build(INFO), 0)
    _, ctx = inputs(length=1)
    none = jax.tree.map(lambda a: a[:, :0], ctx)
    assert run(mixer, jnp.zeros((2, 0, D)), none).shape == (2, 0, D)


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"num_heads": 0}, "num_heads"),
        ({"value_dim": 0}, "value_dim"),
        ({"num_selected": 65}, "num_selected"),
        ({"num_keys": 46341}, "num_keys"),
        ({"key_dim": 7}, "key_dim"),
    ],
)
def test_problems(fields, path):
    config = ProductKeyMemory(**{"num_keys": 8, "num_selected": 4, **fields})
    assert [problem.path for problem in config.problems()] == [path]


def test_good_configs_have_no_problems():
    assert not [problem for config in (GATED, WHOLE) for problem in config.problems()]


def test_layers_share_one_table_and_its_gradient_adds_up():
    shared = GATED.replace(shared_values="memory")
    blocks = [Block(mixers=(config,)) for config in (GATED, shared)]
    own, one = (LMConfig(d_model=D, vocab_size=32, stack=Stack(period=(block,), repeats=2)) for block in blocks)
    specs = one.build()
    rows = GATED.num_rows * GATED.value_dim
    assert count_model(one, specs, 8).table_params == rows
    assert count_model(own, own.build(), 8).table_params == 2 * rows
    read = 2 * GATED.num_heads * GATED.num_selected * GATED.value_dim
    assert count_model(one, specs, 8).active_params == count_model(one, specs, 8).params - rows + read
    model, other = initialize(specs, 0), initialize(own.build(), 0)
    table = model.stack.shared["memory"].values[...]
    for name in ("embed", "norm", "head"):
        setattr(other, name, getattr(model, name))
    mine, theirs = (m.stack.period[0].sub_layers[0] for m in (model, other))
    theirs.norm = mine.norm
    for name in ("keys", "query", "query_norm", "gate", "output"):
        setattr(theirs.mixer, name, getattr(mine.mixer, name))
    theirs.mixer.values = theirs.mixer.values.replace(jnp.stack([table, table]))
    _, ctx = inputs()

    def total(model):
        hidden = model(ctx, dtype=jnp.dtype("float32"), remat=Remat())[0]
        return (jnp.where(ctx.is_token[..., None], hidden, 0.0)[..., 0] ** 2).sum()

    want = jax.jit(jax.grad(total))(other).stack.period[0].sub_layers[0].mixer.values[...].sum(0)
    assert_close(jax.jit(jax.grad(total))(model).stack.shared["memory"].values[...], want, max_rel=1e-5)
