"""UltraMem: the two-step search as published, values and gradients against a dense form, signs, folding, balance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mlt_kernels.testing import assert_close, positions, segment_ids

from mlt.config.problems import collect_problems
from mlt.mixers.base import BuildInfo, Context
from mlt.mixers.channel.ultra_mem import Ring, UltraMem, analytic_value_std
from mlt.mixers.tucker_keys import aligned, find_cells
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.remat import Remat
from mlt.model.stack import Stack
from mlt.nn.param import Buffer, initialize, merge, named_leaves, partition
from mlt.parallel.rules import Rules

D = 16
INFO = BuildInfo(d_model=D, num_sub_layers=4, vocab_size=64)
V2 = UltraMem(num_keys=5, num_selected=4, key_dim=8, value_dim=12, pre_value_dim=6, num_heads=2, key_expand=2)
V1 = UltraMem(num_keys=5, num_selected=4, key_dim=8, value_dim=12, pre_value_dim=None, key_expand=2, group_outputs=True)


def inputs(seed=0, length=17):
    segments = segment_ids(seed, 2, length)
    x = np.random.default_rng(seed).standard_normal((2, length, D)).astype(np.float32)
    ids = jnp.zeros(segments.shape, jnp.int32)
    return jnp.asarray(x), Context(ids, jnp.asarray(segments), jnp.asarray(positions(segments)), Rules(), True)


def searched(rows, columns, core, u, v, count):
    """NumPy, one token and head: rows and columns (R, N) -> cells of the small grid, best first."""
    a, b = np.argsort(-(u @ rows), kind="stable")[:count], np.argsort(-(v @ columns), kind="stable")[:count]
    grid = rows[:, a].T @ core @ columns[:, b]
    best = np.argsort(-grid.ravel(), kind="stable")[:count]
    return a[best // count], b[best % count]


def layer_norm(x, scale):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * scale


def plain(mixer, x, is_token, cells):
    """The published equations over dense one-hot cells; `cells` are the (row, column) places, found in NumPy."""
    config, tucker = mixer.config, mixer.tucker
    q = jnp.einsum("btd,dhrk->bthrk", x, tucker.query.kernel[...])
    q = layer_norm(q.reshape(*q.shape[:3], 2, config.rank, -1), tucker.query_scale[...])
    scores = jnp.einsum("bthsrk,shrnk->sbthrn", q, layer_norm(tucker.keys[...], tucker.key_scale[...]))
    one_hot = [jax.nn.one_hot(at, config.num_virtual_keys, dtype=x.dtype) for at in cells]
    row, column = (jnp.einsum("bthrn,bthkn->bthkr", s, hot) for s, hot in zip(scores, one_hot, strict=True))
    weights = jnp.einsum("bthkr,hcrs,bthks->bthkc", row, tucker.cores[...], column)
    virtual = np.asarray(mixer.permutation[...])[cells[0] * config.num_virtual_keys + cells[1]]
    real = jax.nn.one_hot(virtual % config.num_rows, config.num_rows, dtype=x.dtype)
    values = mixer.tables.values[...].reshape(config.num_rows, config.num_cores, -1)
    if mixer.pre_query is not None:
        pre = jnp.einsum("bthkn,np->bthkp", real, mixer.tables.pre_values[...])
        weights = weights * jnp.einsum("bthkp,btp->bthk", pre, x @ mixer.pre_query.kernel[...])[..., None]
    group = virtual // config.num_rows if config.group_outputs else np.zeros_like(virtual)
    group = jax.nn.one_hot(group, config.num_groups, dtype=x.dtype) * is_token[..., None, None, None]
    pooled = jnp.einsum("bthkg,bthkn,bthkc,ncv->btgcv", group, real, weights, values)
    return jnp.einsum("btgcv,gcvd->btd", pooled, mixer.output.kernel[...]), scores


def cells_of(mixer, scores):
    """The search of every token and head in NumPy float64."""
    tucker, count = mixer.tucker, mixer.config.num_selected
    cores = np.asarray(tucker.cores[...], np.float64).sum(1)
    left, _, right = np.linalg.svd(cores)
    scores = np.asarray(scores, np.float64)
    shape = (*scores.shape[1:4], count)
    rows, columns = np.zeros(shape, int), np.zeros(shape, int)
    for place in np.ndindex(*shape[:3]):
        head = place[2]
        u, v = left[head, :, 0], right[head, 0]
        sign = 1.0 if u.sum() > 0 else -1.0
        rows[place], columns[place] = searched(scores[0][place], scores[1][place], cores[head], sign * u, sign * v, count)
    return rows, columns


@pytest.mark.parametrize("config", [V2, V1], ids=["v2", "v1"])
def test_values_and_gradients_match_the_equations(config):
    mixer = initialize(config.build(INFO), 0)
    x, ctx = inputs()
    is_token = np.asarray(ctx.is_token)

    def total(run):
        def fn(trained, x, buffers):
            y = jnp.where(is_token[..., None], run(merge(trained, buffers), x), 0.0)
            return (y**2).sum(), y

        return jax.jit(jax.value_and_grad(fn, (0, 1), has_aux=True))

    with jax.enable_x64(True):
        wide = lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64 if leaf.dtype == jnp.float32 else None)  # noqa: E731
        trained, buffers = partition(jax.tree.map(wide, mixer))
        some = (np.zeros((2, 17, config.num_heads, config.num_selected), int),) * 2
        scores = plain(merge(trained, buffers), wide(x), is_token, some)[1]
        cells = cells_of(mixer, scores)
        fixed = np.asarray(mixer.permutation[...])

        def exact(m, x):
            m.permutation = Buffer(fixed)
            return plain(m, x, is_token, cells)[0]

        want = jax.tree.map(np.asarray, total(exact)(trained, wide(x), buffers))
    got = total(lambda m, x: m(x, ctx)[0])(*partition(mixer)[:1], x, partition(mixer)[1])
    for (path, value), found in zip(jax.tree.leaves_with_path(want), jax.tree.leaves(got), strict=True):
        assert_close(found, value, max_rel=2e-5, what=jax.tree_util.keystr(path))


def test_rank_one_is_the_product_of_two_lists():
    """With one core of 1 the cells are the best products of the best of each side, with exactly those products."""
    rng = np.random.default_rng(0)
    rows, columns = rng.standard_normal((2, 1, 3, 1, 1, 20)).astype(np.float32)
    one = jnp.ones((1, 1, 1)), jnp.ones((1, 2, 1))
    found = find_cells(jnp.asarray(rows), jnp.asarray(columns), *one, num_selected=6)
    for t in range(3):
        a, b = np.sort(rows[0, t, 0, 0])[::-1][:6], np.sort(columns[0, t, 0, 0])[::-1][:6]
        want = np.sort(np.outer(a, b).ravel())[::-1][:6]
        got = rows[0, t, 0, 0][np.asarray(found[0])[0, t, 0]] * columns[0, t, 0, 0][np.asarray(found[1])[0, t, 0]]
        np.testing.assert_array_equal(got, want)


def test_blocks_of_tokens_find_the_same_cells(monkeypatch):
    rng = np.random.default_rng(1)
    scores = jnp.asarray(rng.standard_normal((2, 2, 7, 2, 2, 12)).astype(np.float32))
    cores, factors = jnp.asarray(rng.standard_normal((2, 2, 2))), jnp.asarray(rng.standard_normal((2, 2, 2)))
    whole = find_cells(scores[0], scores[1], cores, factors, num_selected=4)
    monkeypatch.setattr("mlt.mixers.tucker_keys.CELLS_AT_ONCE", 4 * 4 * 2 * 3)
    for a, b in zip(whole, find_cells(scores[0], scores[1], cores, factors, num_selected=4), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_joint_sign_is_kept_and_searches_one_quadrant():
    rng = np.random.default_rng(2)
    factors = jnp.asarray(rng.standard_normal((3, 2, 2)).astype(np.float32))
    np.testing.assert_array_equal(aligned(-factors, factors), factors)
    near = factors + 0.01
    np.testing.assert_array_equal(aligned(-near, factors), near)
    first = aligned(-factors, jnp.zeros_like(factors))
    assert (np.asarray(first)[:, 0].sum(-1) > 0).all()
    scores = jnp.asarray(rng.standard_normal((2, 1, 5, 3, 2, 30)).astype(np.float32))
    cores = jnp.asarray(rng.uniform(size=(3, 2, 2)).astype(np.float32))
    here, there = (find_cells(scores[0], scores[1], cores, sign * first, num_selected=4) for sign in (1.0, -1.0))
    assert not np.array_equal(here[0], there[0])


def test_signs_are_remembered_and_a_small_change_of_the_cores_moves_no_cell():
    mixer = initialize(V2.build(INFO), 0)
    x, ctx = inputs()
    assert not np.asarray(mixer.tucker.factors[...]).any()
    moved = mixer.updated({})
    np.testing.assert_array_equal(moved.tucker.factors[...], mixer.tucker.leading_factors())
    # The other sign remembered stays the other sign, whatever LAPACK says.
    turned = moved.tucker.remembered()
    turned.factors = turned.factors.replace(-moved.tucker.factors[...])
    np.testing.assert_array_equal(turned.leading_factors(), -moved.tucker.factors[...])
    cells = moved.tucker(x, ctx.rules, V2.num_selected)
    moved.tucker.cores = moved.tucker.cores.replace(moved.tucker.cores[...] * (1 + 1e-6))
    after = moved.tucker(x, ctx.rules, V2.num_selected)
    np.testing.assert_array_equal(after.rows, cells.rows)
    np.testing.assert_array_equal(after.columns, cells.columns)


def test_virtual_rows_fold_onto_real_ones():
    """With the identity in place of the permutation, virtual rows v and v + num_rows read one real row."""
    mixer = initialize(V2.build(INFO), 0)
    n = V2.num_virtual_keys**2
    order = np.asarray(mixer.permutation[...])
    np.testing.assert_array_equal(np.sort(order), np.arange(n))
    shifted = (np.arange(n) + V2.num_rows) % n
    x, ctx = inputs()
    results = []
    for table in (np.arange(n), shifted):
        mixer.permutation = mixer.permutation.replace(jnp.asarray(table, jnp.int32))
        results.append(np.asarray(mixer(x, ctx)[0]))
    np.testing.assert_array_equal(*results)


def ringed(number: int = 0) -> UltraMem:
    ring = Ring(name="memory", num_layers=4, share=0.5, number=number)
    return UltraMem(num_keys=4, num_selected=3, key_dim=8, value_dim=8, pre_value_dim=4, ring=ring)


def test_layers_of_a_ring_read_one_pair_of_tables_that_wraps():
    """A scanned stack against four unrolled layers of the same weights; gradients of the tables add up over layers."""
    scanned = LMConfig(d_model=D, vocab_size=32, stack=Stack(period=(Block(mixers=(ringed(),)),), repeats=4))
    unrolled = scanned.replace(stack=Stack(head=tuple(Block(mixers=(ringed(i),)) for i in range(4))))
    assert not list(collect_problems(scanned)) + list(collect_problems(unrolled))
    model, other = initialize(scanned.build(), 0), initialize(unrolled.build(), 0)
    tables = [name for name, _ in named_leaves(model) if "values" in name]
    assert tables == ["stack.shared.memory.pre_values", "stack.shared.memory.values"]
    mixers = [jax.tree.map(lambda leaf, i=i: leaf[i], model.stack.period[0].sub_layers[0].mixer) for i in range(4)]
    assert [int(m.number[...]) for m in mixers] == [0, 1, 2, 3]
    # 4 * 16 rows in all, of which a layer addresses 5^2, the last one from row 48 on.
    virtual = jnp.arange(25)
    np.testing.assert_array_equal(mixers[3]._real(virtual), (np.arange(25) + 48) % 64)
    assert model.stack.shared["memory"].values.shape == (64 * 2, 4)

    other.embed, other.norm, other.head, other.stack.shared = model.embed, model.norm, model.head, model.stack.shared
    for i in range(4):
        other.stack.head[i] = jax.tree.map(lambda leaf, i=i: leaf[i], model.stack.period[0])
    _, ctx = inputs()

    @jax.jit
    def run(model):
        trained, buffers = partition(model)

        def total(trained):
            hidden = merge(trained, buffers)(ctx, dtype=jnp.dtype("float32"), remat=Remat())[0]
            return (jnp.where(ctx.is_token[..., None], hidden, 0.0)[..., 0] ** 2).sum()

        value, grads = jax.value_and_grad(total)(trained)
        return value, grads.stack.shared

    assert_close(run(model), run(other), max_rel=1e-5)


def test_balance_loss_is_its_coefficient_where_keys_are_used_evenly():
    config = V2.model_copy(update={"balance_loss": 0.25})
    mixer = initialize(config.build(INFO), 0)
    mixer.tucker.keys = mixer.tucker.keys.replace(jnp.zeros_like(mixer.tucker.keys[...]))
    x, ctx = inputs()
    # All scores equal: the mean softmax is even, so the loss is the coefficient wherever the cells lie.
    assert float(mixer(x, ctx)[1]["loss/balance"]) == pytest.approx(0.25, rel=1e-5)


def test_analytic_std():
    std = analytic_value_std(d_model=2048, d_ff=8192, num_layers=16, num_selected=128, value_dim=768, pre_value_dim=384)
    assert std**4 == pytest.approx(0.2 * 8192 * 2048 / (128 * 2 * 384 * 768 * 16))


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"num_selected": 17}, "num_selected"),
        ({"num_cores": 5}, "num_cores"),
        ({"num_keys": 40000}, "num_keys"),
        ({"rank": 0}, "rank"),
        ({"balance_loss": -1.0}, "balance_loss"),
    ],
)
def test_problems(fields, path):
    config = UltraMem(**{"num_keys": 8, "num_selected": 4, "key_expand": 2, **fields})
    assert [problem.path for problem in config.problems()] == [path]
