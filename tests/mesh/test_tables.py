"""Tables over owners: what is read, every gradient and one update are those of one device, and nothing is lost or dense."""

import dataclasses
import functools
import math
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compile_options import FUSED

from mlt.checkpoint.restore import restore
from mlt.checkpoint.save import Checkpointer
from mlt.config.load import load_config
from mlt.config.run import RunConfig
from mlt.mixers.base import BuildInfo, Context
from mlt.mixers.channel.engram import Engram
from mlt.mixers.channel.peer import PEER
from mlt.mixers.channel.product_key_memory import ProductKeyMemory
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.channel.ultra_mem import Ring, UltraMem
from mlt.mixers.sequence.parallel import Parallel
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.remat import Remat
from mlt.model.stack import Stack
from mlt.nn.ngram_hash import multipliers, ngram_rows, split_words
from mlt.nn.param import named_leaves, partition
from mlt.optim.lazy_adam import LazyAdam
from mlt.optim.rowwise_adagrad import RowwiseAdagrad
from mlt.optim.table_problems import table_problems, too_long
from mlt.parallel import lookup, ops, rows, table
from mlt.parallel.mesh import Layout
from mlt.parallel.rules import Rules
from mlt.parallel.taps import Anchor, Tap, TapedTable
from mlt.train.setup import build_optimizer, describe_model, step_options
from mlt.train.state import abstract_batch, abstract_state, create_state
from mlt.train.step import jit_train_step, train_step
from mlt.verify.material import packed_rows

B, T, K, M, V = 8, 12, 5, 64, 6
ONE = Rules(None)
LAYOUTS = {"owners": Layout(fsdp=8), "copies": Layout(replica=2, fsdp=2, context=2), "tensor": Layout(fsdp=4, tensor=2)}
slow = pytest.mark.skipif(not os.environ.get("MLT_FULL"), reason="minutes; MLT_FULL=1 runs it")
READS = [("reduce", 1.25), ("exchange", None), ("exchange", 0.4)]


def given(layers: int | None, seed: int = 0) -> dict[str, np.ndarray]:
    """A table, ids that crowd a few owners, some of them none, and weights."""
    rng = np.random.default_rng(seed)
    ids = np.minimum(rng.integers(0, M + 4, (B, T, K)), rng.integers(0, M + 4, (B, T, K)))
    ids = np.where(rng.random(ids.shape) < 0.1, -1, ids).astype(np.int32)
    shape = (M, V) if layers is None else (layers, M, V)
    values = rng.standard_normal(shape).astype(np.float32)
    return {"values": values, "ids": ids, "weights": rng.standard_normal(ids.shape).astype(np.float32)}


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize(("strategy", "capacity"), READS)
def test_every_way_to_read_is_that_of_one_device(strategy: str, capacity: float | None, pooled: bool):
    case = given(None)
    ids = jnp.asarray(case["ids"])
    weights = jnp.asarray(case["weights"]) if pooled else None

    def run(values, weights, rules):
        out = ops.row_lookup(rules, values, ids, weights, strategy=strategy, capacity=capacity)
        return jnp.sum(jnp.sin(out)), out

    gradient = jax.jit(jax.value_and_grad(run, argnums=(0, 1) if pooled else 0, has_aux=True), static_argnums=2)
    (_, expected), wanted = gradient(jnp.asarray(case["values"]), weights, ONE)
    for layout in (LAYOUTS["owners"], LAYOUTS["copies"]):
        rules = layout.rules()
        values = jax.device_put(case["values"], rules.sharding(("memory", None)))
        (_, found), grads = gradient(values, weights, rules)
        if strategy == "exchange":
            np.testing.assert_array_equal(found, expected)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5), grads, wanted)


def test_what_does_not_fit_is_counted_and_comes_later():
    case, rules = given(None), LAYOUTS["owners"].rules()
    case["ids"] = np.arange(B * T * K, dtype=np.int32).reshape(B, T, K) % 8  # the first owner holds them all
    values = jax.device_put(case["values"], rules.sharding(("memory", None)))
    read = functools.partial(lookup.row_lookup, rules, values, jnp.asarray(case["ids"]), None, strategy="exchange")
    found, waiting = jax.jit(functools.partial(read, capacity=0.5))()
    np.testing.assert_array_equal(found, case["values"][case["ids"]])
    room = math.ceil(0.5 * T * K / 8)
    assert int(waiting) == 8 * (8 - room)
    assert int(jax.jit(functools.partial(read, capacity=None))()[1]) == 0


def test_documents_are_isolated_to_the_bit():
    """Other ids in one half of the rows change no bit of the rest, though they crowd the owners."""
    case, rules = given(None), LAYOUTS["copies"].rules()
    values = jax.device_put(case["values"], rules.sharding(("memory", None)))
    other = case["ids"].copy()
    other[: B // 2, : T // 3] = 3
    for strategy, capacity in READS:
        read = jax.jit(functools.partial(ops.row_lookup, rules, strategy=strategy, capacity=capacity))
        one, two = (np.asarray(read(values, jnp.asarray(ids), case["weights"])) for ids in (case["ids"], other))
        np.testing.assert_array_equal(one[B // 2 :], two[B // 2 :])
        np.testing.assert_array_equal(one[:, T // 3 :], two[:, T // 3 :])


def test_the_rule_takes_what_sends_less():
    sizes = {"tokens": 4096, "slots": 16, "width": 80, "rows": 2**22}
    assert table.choose(**sizes, shards=8, pooled=False) == "exchange"
    assert table.choose(**sizes, shards=2, pooled=True) == "reduce"
    assert table.choose(**sizes | {"slots": 2}, shards=64, pooled=True) == "exchange"


@pytest.mark.parametrize("own", [2**31 - 1, 2**28 + 3])
def test_rows_beyond_32_bits_have_their_owners(own: int):
    """Against unsigned 64-bit arithmetic, at the edges of words and of owners; nothing is allocated."""
    owners, rng = 8, np.random.default_rng(0)
    edges = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**33 + 5, own, own - 1, 7 * own, 8 * own - 1]
    ids = np.concatenate([[e for e in edges if e < 8 * own], rng.integers(0, owners * own, 1000)]).astype(np.uint64)
    owner, local = table.owner_of(table.split_rows(ids.astype(np.int64)), owners, own)
    np.testing.assert_array_equal(np.asarray(owner, np.uint64), ids // np.uint64(own))
    np.testing.assert_array_equal(np.asarray(local, np.uint64), ids % np.uint64(own))
    outside = np.array([-1, -(2**40), owners * own, 2**45], np.int64)
    assert (np.asarray(table.owner_of(table.split_rows(outside), owners, own)[0]) == owners).all()


def test_a_table_of_5_billion_rows_on_shapes():
    """Lookup and gradient of a row-updated table lower for 64 devices; rows of one owner fit 32 bits, those of all do not."""
    rules = Layout(fsdp=32, replica=2).abstract_rules()
    num_rows = 5 * 2**30
    place = lambda shape, axes, kind: jax.ShapeDtypeStruct(shape, kind, sharding=rules.sharding(axes))  # noqa: E731
    values = place((num_rows, V), ("memory", None), jnp.float32)
    word = functools.partial(place, (64, T, K), ("batch", "seq", None))

    def run(values, high, low):
        wide = table.WideRows(high, low)
        (tap,) = _taps(lambda taped: ops.row_lookup(rules, taped, wide), values)
        read = lambda tap: jnp.sum(ops.row_lookup(rules, TapedTable(Anchor(values), jnp.int32(0), (tap,)), wide) ** 2)  # noqa: E731
        return rows.merge((jax.grad(read)(tap),), values.shape, rules).norm_squared()

    text = jax.jit(run).trace(values, word(jnp.int32), word(jnp.uint32)).lower(lowering_platforms=("cuda",)).as_text()
    assert f"tensor<{num_rows // 32}x{V}xf32>" in text
    assert not re.search(rf"tensor<{num_rows}x{V}xf32>.*stablehlo.broadcast", text)
    with pytest.raises(ValueError, match="use more fsdp shards"):
        table.owner_of(table.WideRows(jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.uint32)), 2, num_rows // 2)


def _taps(read, values) -> tuple[Tap, ...]:
    anchor = Anchor(values)
    jax.eval_shape(lambda: read(TapedTable(anchor, jnp.zeros((), jnp.int32), None)))
    return anchor.taps()


@pytest.mark.parametrize("name", ["one", *LAYOUTS])
def test_rows_of_records_are_the_dense_gradient(name: str):
    """Two lookups and a product of one stacked table, merged at the owners in several rounds."""
    case = given(2)
    ids, weights, values = (jnp.asarray(case[key]) for key in ("ids", "weights", "values"))
    x = weights[..., :1] * jnp.arange(1.0, V + 1)

    def loss(read_of_layer, x, rules):
        total = 0.0
        for layer in range(2):
            values = read_of_layer(layer)
            pooled = ops.row_lookup(rules, values, ids, weights)
            dots = ops.row_dot(rules, values, (ids + 9 * layer) % M, x)
            total += jnp.sum(jnp.sin(pooled)) + jnp.sum(jnp.cos(dots)) + jnp.sum(ops.row_lookup(rules, values, ids) ** 3)
        return total

    want, want_x = jax.jit(jax.grad(lambda v, x: loss(lambda i: v[i], x, ONE), argnums=(0, 1)))(values, x)
    rules = ONE if name == "one" else LAYOUTS[name].rules()
    placed = values if name == "one" else jax.device_put(values, rules.sharding(("layers", "memory", None)))

    @jax.jit
    def run(values, x):
        def taped(taps, anchor):
            return lambda i: TapedTable(anchor, jnp.int32(i), None if taps is None else jax.tree.map(lambda t: t[i], taps))

        found = Anchor(values)
        jax.eval_shape(lambda: loss(taped(None, found), x, rules))
        grad = jax.grad(lambda taps, x: loss(taped(taps, Anchor(values)), x, rules), argnums=(0, 1))
        taps, d_x = grad(found.taps(), x)
        merged = rows.merge(taps, values.shape, rules)
        return merged.dense(), merged.scaled(jnp.float32(2.0)).norm_squared(), d_x

    dense, norm, d_x = run(placed, x)
    np.testing.assert_allclose(dense, want, atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(d_x, want_x, atol=2e-5, rtol=1e-5)
    assert float(norm) == pytest.approx(4 * float(jnp.sum(want**2)), rel=1e-5)
    assert ((np.asarray(dense) == 0) == (np.asarray(want) == 0)).all()


ROWS, LENGTH = 8, 24
MULTIPLIERS = split_words(multipliers(64, 3, 0))


def small(tables, *, accumulation: int = 1, keys: int = 24, per_head: int = 2500) -> RunConfig:
    """Engram over a scanned pair of memories and a layer of single-neuron experts, rematerialized."""
    config = load_config("configs/quickstart.py", args=["width=32", f"sequence_length={LENGTH}", f"batch_size={ROWS}"])
    engram = Engram(layer_id=0, layer_ids=(0,), rows_per_head=per_head, head_dim=8, heads_per_order=1)
    memory = ProductKeyMemory(num_keys=keys, num_selected=3, num_heads=2, key_dim=16, value_dim=12)
    peer = PEER(num_keys=24, num_selected=2, num_heads=2, key_dim=16)
    stack = Stack(head=(Block(mixers=(engram, peer)),), period=(Block(mixers=(memory,)),), repeats=2)
    return config.replace(
        model=LMConfig(d_model=32, vocab_size=272, stack=stack),
        optimizer=config.optimizer.replace(tables=tables),
        remat=Remat(mode="sub_layer"),
        train=config.train.replace(grad_accumulation=accumulation),
    )


def sharing(accumulation: int = 1, keys: tuple[int, int] = (24, 32)) -> RunConfig:
    """Two tables that several layers read: twice in one block, and in a scanned one; a ring in a scan and behind it."""
    config = small(SHARED, accumulation=accumulation)
    search = {"num_selected": 3, "num_heads": 2, "key_dim": 16, "value_dim": 12}
    memory = ProductKeyMemory(num_keys=keys[0], shared_values="all", **search)
    ring = functools.partial(Ring, name="ring", num_layers=3)
    ultra = functools.partial(UltraMem, num_keys=keys[1], pre_value_dim=8, **search)
    period = Block(mixers=(memory, Parallel(mixers=(SwiGLU(d_ff=16), ultra(ring=ring(number=1))))))
    head, tail = Block(mixers=(memory, memory.replace(num_selected=2))), Block(mixers=(ultra(ring=ring()),))
    stack = Stack(head=(head,), period=(period,), repeats=2, tail=(tail,))
    return config.replace(model=config.model.replace(stack=stack))


class Step:
    """A float32 step of a config on a layout, from the same start on the same packed documents.

    With `dense` every gradient is dense, and the optimizers by rows make their update from it.
    """

    def __init__(self, config: RunConfig, layout: Layout, *, dense: bool = False):
        self.rules = layout.rules(jax.devices()[: layout.num_devices])
        self.specs = describe_model(config)
        self.optimizer = build_optimizer(config, self.specs)
        if dense:
            self.optimizer = dataclasses.replace(self.optimizer, lazy=())
        self.options = dataclasses.replace(step_options(config, self.rules, self.specs), dtype=jnp.dtype("float32"))
        self.start = create_state(self.specs, self.optimizer, self.rules, seed=0)
        batch = packed_rows(np.random.default_rng(0), rows=ROWS, length=LENGTH, num_ids=259)
        self.batch = jax.device_put(batch, self.rules.sharding(("batch", "seq")))
        places = jax.tree.map(lambda x: x.sharding, abstract_state(self.specs, self.optimizer, self.rules))
        step = functools.partial(train_step, optimizer=self.optimizer, options=self.options)
        lowered = jax.jit(step, out_shardings=(places, None)).lower(self.start, self.batch)
        self.compiled = lowered.compile()

    def __call__(self, state=None):
        return self.compiled(self.start if state is None else state, self.batch)


def tables_of(state) -> dict[str, np.ndarray]:
    ends = ("mixer.table", ".values", ".pre_values", "mixer.up", "mixer.down")
    return {name: np.asarray(leaf) for name, leaf in named_leaves(state.model) if name.endswith(ends)}


SETTINGS = (RowwiseAdagrad(names="*.table"), LazyAdam(names="*.values", eps=1e-3), LazyAdam(eps=1e-3, correction="row"))


SHARED = (RowwiseAdagrad(names="*.pre_values"), LazyAdam(eps=1e-3))


@functools.cache
def lazy_step(name: str) -> Step:
    return Step(small(SETTINGS), LAYOUTS[name])


@pytest.fixture(scope="module")
def single():
    return Step(small(SETTINGS), Layout())


def test_rows_give_the_dense_norm_and_the_dense_update(single):
    """From the same weights: the norm, every dense parameter, and the rows that are read."""
    whole = Step(small(None), Layout())
    (dense, told), (lazy, said) = whole(), single()
    assert float(said["train/grad_norm"]) == pytest.approx(float(told["train/grad_norm"]), rel=1e-6)
    assert float(said["train/loss"]) == float(told["train/loss"])
    moved, start, slots = tables_of(lazy), tables_of(single.start), lazy.optimizer["tables"]
    for name, leaf in named_leaves(dense.model):
        if name not in moved:
            np.testing.assert_allclose(dict(named_leaves(lazy.model))[name], leaf, atol=1e-6, err_msg=name)
            continue
        # Adam's first step is g / (|g| + eps) where a row is read; Adagrad's is g / sqrt(mean(g^2)).
        read = (np.asarray(leaf) != start[name]).any(-1)
        assert 0 < read.sum() < read.size
        np.testing.assert_array_equal((moved[name] != start[name]).any(-1), read, err_msg=name)
        for slot, held in slots.items():
            if name in held:
                value = np.asarray(held[name])
                np.testing.assert_array_equal((value.reshape(*read.shape, -1) != 0).any(-1), read, err_msg=f"{slot} {name}")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_lazy_step_equals_one_device(single, name: str):
    other = lazy_step(name)
    # Two steps: the second meets moments that are not zero.
    (one, told), (two, said) = single(single()[0]), other(other()[0])
    assert float(said["train/loss"]) == pytest.approx(float(told["train/loss"]), rel=1e-5)
    agree(one, two, told, said, 2e-4)


@pytest.fixture(scope="module")
def shared():
    return Step(sharing(), Layout())


def agree(one, two, told, said, tolerance: float) -> None:
    """States and metrics of a step, to a part of the largest value of each array."""
    assert float(said["train/grad_norm"]) == pytest.approx(float(told["train/grad_norm"]), rel=1e-5)
    expected = dict(named_leaves((one.model, one.optimizer)))
    for key, value in named_leaves((two.model, two.optimizer)):
        want = np.asarray(expected[key], np.float64)
        scale = np.abs(want).max() + 1e-12
        assert np.abs(np.asarray(value) - want).max() <= tolerance * scale, key


def test_records_of_all_layers_of_a_shared_table_make_the_update_of_the_dense_gradient(shared):
    """Two steps; each row's gradient is the sum over every layer that reads the table."""
    whole = Step(sharing(), Layout(), dense=True)
    (one, told), (two, said) = whole(whole()[0]), shared(shared()[0])
    agree(one, two, told, said, 1e-5)
    start, moved = tables_of(shared.start), tables_of(two)
    assert sorted(moved) == ["stack.shared.all.values", "stack.shared.ring.pre_values", "stack.shared.ring.values"]
    for name, value in moved.items():
        read = (value != start[name]).any(-1)
        assert 0 < read.sum() < read.size, name


@pytest.mark.parametrize(
    ("layout", "accumulation"),
    [(LAYOUTS["copies"], 2), pytest.param(LAYOUTS["owners"], 1, marks=slow), pytest.param(LAYOUTS["tensor"], 2, marks=slow)],
)
def test_a_shared_table_over_the_mesh_and_micro_batches_is_that_of_one_device(shared, layout: Layout, accumulation: int):
    other = Step(sharing(accumulation), layout)
    (one, told), (two, said) = shared(shared()[0]), other(other()[0])
    agree(one, two, told, said, 2e-4)


def test_micro_batches_make_one_update(single):
    (one, _), (two, _) = single(), Step(small(SETTINGS, accumulation=4), Layout())()
    expected = tables_of(one)
    for name, value in tables_of(two).items():
        np.testing.assert_allclose(value, expected[name], atol=2e-5, err_msg=name)


def test_a_refused_step_moves_no_row(single):
    """A loss that is not finite: tables and their state keep their bits."""
    broken = dict(single.batch)
    broken["weights"] = broken["weights"].at[0, 0].set(jnp.nan)
    new, told = single.compiled(single.start, broken)
    assert float(told["guard/skipped"]) == 1
    for (name, a), (_, b) in zip(named_leaves(new.optimizer), named_leaves(single.start.optimizer), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
    for name, value in tables_of(new).items():
        np.testing.assert_array_equal(value, tables_of(single.start)[name], err_msg=name)


def _trace(config: RunConfig, layout: Layout):
    rules, specs = layout.rules(jax.devices()[: layout.num_devices]), describe_model(config)
    optimizer = build_optimizer(config, specs)
    abstract = abstract_state(specs, optimizer, rules)
    step = jit_train_step(abstract, optimizer, step_options(config, rules, specs))
    sizes = {spec.size for spec in jax.tree.leaves(partition(specs)[0]) if spec.group == "table"}
    return step.trace(abstract, abstract_batch(rules, ROWS, LENGTH)), sizes


def _arrays(jaxpr):
    """(primitive, shape) of everything that a program makes."""
    for equation in jaxpr.eqns:
        inner = [j for p in equation.params.values() for j in (p if isinstance(p, (tuple, list)) else (p,))]
        inner = [getattr(j, "jaxpr", j) for j in inner]
        inner = [j for j in inner if hasattr(j, "eqns")]
        for j in inner:
            yield from _arrays(j)
        if not inner:
            yield from ((equation.primitive.name, v.aval.shape) for v in equation.outvars)


IN_PLACE = {"scatter", "reshape"}
COMPILED = {"parameter", "scatter", "fusion", "bitcast", "get-tuple-element", "while", "tuple"}


def alone(accumulation: int) -> RunConfig:
    """Tables of one layer each, of sizes that nothing else has."""
    config = small(LazyAdam(), accumulation=accumulation, keys=56)
    stack = config.model.stack
    stack = stack.replace(head=(Block(mixers=stack.head[0].mixers[:1]),))
    return config.replace(model=config.model.replace(stack=stack))


def shared_alone(accumulation: int) -> RunConfig:
    """Shared tables that have more rows than a step reads, of sizes that nothing else has."""
    return sharing(accumulation, keys=(74, 50))


SPLIT = Layout(fsdp=4, context=2)


@pytest.mark.parametrize(
    ("make", "layout", "accumulation"),
    [(alone, Layout(), 1), (alone, SPLIT, 2), (shared_alone, Layout(), 1), pytest.param(shared_alone, SPLIT, 2, marks=slow)],
)
def test_no_dense_gradient_of_a_table_exists(make, layout: Layout, accumulation: int):
    """In the traced and in the compiled program a table's shape is only read and written in place, donated."""
    config = make(accumulation)
    traced, sizes = _trace(config, layout)
    sizes |= {size // layout.fsdp for size in sizes} | {56 * 56 * 12, 56 * 56 * 12 // layout.fsdp}
    big = {(name, shape) for name, shape in _arrays(traced.jaxpr.jaxpr) if len(shape) > 1 and math.prod(shape) in sizes}
    assert {name for name, _ in big} <= IN_PLACE, big
    compiled = traced.lower().compile(FUSED)
    made = re.findall(r"= f32\[([\d,]+)\]\S* ([\w\-]+)\(", compiled.as_text())
    found = {(kind, dims) for dims, kind in made if "," in dims and math.prod(map(int, dims.split(","))) in sizes}
    assert {kind for kind, _ in found} <= COMPILED, found
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes > 0.98 * memory.output_size_in_bytes


def test_sixteen_million_rows_take_the_same_work():
    """1M and 16M rows of lookup, merge and update: one program but for the table's own shape, in as many temporary bytes."""

    def program(num_rows: int) -> tuple[str, int]:
        adam = LazyAdam()
        shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)  # noqa: E731
        ids = jax.ShapeDtypeStruct((2, T, K), jnp.int32)

        def run(values, first, second, ids):
            read = lambda tap: jnp.sum(ops.row_lookup(ONE, TapedTable(Anchor(values), jnp.int32(0), (tap,)), ids) ** 2)  # noqa: E731
            (tap,) = _taps(lambda taped: ops.row_lookup(ONE, taped, ids), values)
            grad = rows.merge((jax.grad(read)(tap),), values.shape, ONE)
            update = lambda old, g: adam.update(*old, g, jnp.float32(0.1), jnp.int32(1))  # noqa: E731
            axes = (("memory", None), {"first": ("memory", None), "second": ("memory", None)})
            return grad.apply((values, {"first": first, "second": second}), axes, update)

        lowered = jax.jit(run, donate_argnums=(0, 1, 2)).lower(*(shape(num_rows, V) for _ in range(3)), ids)
        text = lowered.as_text().replace(str(num_rows), "M").replace(str(num_rows - 1), "M-1")
        return text, lowered.compile(FUSED).memory_analysis().temp_size_in_bytes

    assert program(2**20) == program(2**24)


def test_lazy_state_restores_on_other_owners(tmp_path):
    """Rows are saved in their own order: a checkpoint of eight owners is that of one, bit for bit."""
    other = lazy_step("owners")
    state = other()[0]
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(1, state, data={}, meta={"config_hash": "x"})
    for layout in (Layout(), Layout(fsdp=2, tensor=2)):
        rules = layout.rules(jax.devices()[: layout.num_devices])
        found = restore(tmp_path, abstract_state(other.specs, other.optimizer, rules)).state
        for (name, a), (_, b) in zip(named_leaves(found), named_leaves(state), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)


def test_an_optimizer_that_matches_no_table_is_refused():
    config = small(LazyAdam(names="*.nothing"))
    (problem,) = table_problems(config.optimizer.table_optimizers, partition(describe_model(config))[0])
    assert "matches no table" in problem.rule
    assert "mixer.table" in problem.rule


def test_engram_addresses_more_rows_than_32_bits_hold():
    """The whole mixer on shapes, with sequence shards: ids in two words, an owner's rows in one."""
    config = Engram(layer_id=0, layer_ids=(0,), rows_per_head=2**28, head_dim=2, heads_per_order=8, compress_tokens=False)
    assert config.tables.num_rows > 2**32
    assert not list(config.problems())
    specs = config.build(BuildInfo(d_model=8, num_sub_layers=1, vocab_size=64))
    layout = Layout(fsdp=8, context=2)
    rules = layout.abstract_rules()
    assert not list(too_long(specs, rules))
    (problem,) = too_long(specs, Layout(fsdp=2).abstract_rules())
    assert "mixer" not in problem.path
    assert problem.value == 2
    mixer = jax.tree.map(lambda spec, where: spec.abstract(where), specs, rules.param_shardings(specs))
    tokens = jax.ShapeDtypeStruct((8, 16), jnp.int32, sharding=rules.sharding(("batch", "seq")))
    stream = jax.ShapeDtypeStruct((8, 16, 8), jnp.float32, sharding=rules.sharding(("batch", "seq", None)))
    call = lambda mixer, x, ids: mixer(x, Context(ids, ids, ids, rules, True))[0]  # noqa: E731
    text = jax.jit(call).trace(mixer, stream, tokens).lower(lowering_platforms=("cuda",)).as_text()
    assert f"tensor<{-(-config.tables.num_rows // 1024) * 1024 // 8}x2xf32>" in text
    rows = ngram_rows(np.arange(32)[None], np.ones((1, 32), np.int32), MULTIPLIERS, config.tables, pad_id=0)
    whole = (rows[0].astype(np.int64) << 32) | rows[1]
    head = whole - np.array(config.tables.offsets)
    assert ((head >= 0) & (head < np.array(config.tables.sizes))).all()
    assert whole.max() > 2**32 // 2
