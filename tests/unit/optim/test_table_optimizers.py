"""Optimizers of tables against the published formulas, in float64 and row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlt.mixers.base import BuildInfo
from mlt.mixers.channel.product_key_memory import ProductKeyMemory
from mlt.nn.param import initialize, named_leaves, partition
from mlt.optim.adamw import AdamW
from mlt.optim.dense_adam import DenseAdam
from mlt.optim.lazy_adam import LazyAdam
from mlt.optim.rowwise_adagrad import RowwiseAdagrad
from mlt.optim.schedule import WarmupCosine
from mlt.optim.table import apply_updates, assigned, filled, gradient_norm, scaled, without
from mlt.parallel import ops
from mlt.parallel.rows import merge
from mlt.parallel.rules import Rules
from mlt.parallel.taps import Anchor, TapedTable

M, V = 9, 4
STEADY = WarmupCosine(warmup_steps=0, final_fraction=1.0)
NAME = "values"


def model():
    config = ProductKeyMemory(num_keys=3, num_selected=2, num_heads=1, key_dim=4, value_dim=V)
    specs = config.build(BuildInfo(d_model=8, num_sub_layers=1, vocab_size=8))
    return partition(specs)[0], partition(initialize(specs, 0))[0]


def by_rows(ids: np.ndarray, vectors: np.ndarray):
    """The gradient that adds each vector to its row, as records of a lookup make it."""
    values = jnp.zeros((M, V))
    ids = jnp.asarray(ids, jnp.int32)[None, :, None]
    read = lambda taped: ops.row_lookup(Rules(None), taped, ids)  # noqa: E731
    anchor = Anchor(values)
    jax.eval_shape(lambda: read(TapedTable(anchor, jnp.int32(0), None)))
    zeros = anchor.taps()
    loss = lambda taps: jnp.sum(read(TapedTable(Anchor(values), jnp.int32(0), taps)) * vectors[None, :, None])  # noqa: E731
    return merge(jax.grad(loss)(zeros), (M, V), Rules(None))


def run(config: AdamW, steps: list[tuple[np.ndarray, np.ndarray]], *, dense: bool = False) -> tuple[np.ndarray, dict]:
    """The table, and its slots, after steps of (ids, vectors); everything else gets gradients of zero."""
    specs, trained = model()
    optimizer = config.transformation(specs, STEADY, 10)
    state = optimizer.init(trained)
    for ids, vectors in steps:
        rows = by_rows(ids, vectors)
        grads = filled(without(jax.tree.map(jnp.zeros_like, trained), (NAME,)), {NAME: rows.dense() if dense else rows})
        updates, state = optimizer.update(grads, state, trained)
        trained = apply_updates(trained, updates)
    slots = {slot: np.asarray(held[NAME]) for slot, held in state["tables"].items()} if isinstance(state, dict) else {}
    return np.asarray(dict(named_leaves(trained))[NAME], np.float64), slots


def steps_of(rng: np.random.Generator, count: int, *, every_row: bool = False) -> list[tuple[np.ndarray, np.ndarray]]:
    made = []
    for _ in range(count):
        ids = np.concatenate([np.arange(M), rng.integers(0, M, 5)]) if every_row else rng.integers(-1, 5, 7)
        made.append((ids, rng.standard_normal((ids.size, V)).astype(np.float32)))
    return made


def summed(ids: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    total = np.zeros((M, V))
    np.add.at(total, ids[ids >= 0], vectors[ids >= 0].astype(np.float64))
    return total


def test_lazy_adam_is_adam_where_every_row_is_read():
    steps = steps_of(np.random.default_rng(0), 4, every_row=True)
    base = AdamW(learning_rate=0.02)
    expected, _ = run(base, steps, dense=True)
    for correction in ("run", "row"):
        found, _ = run(base.replace(tables=LazyAdam(correction=correction)), steps)
        np.testing.assert_allclose(found, expected, atol=1e-6)
    found, _ = run(base.replace(tables=DenseAdam()), steps, dense=True)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("correction", ["run", "row"])
def test_lazy_adam_against_a_loop(correction: str):
    """Duplicates are summed before they are squared; rows that are not read keep value and moments."""
    steps = steps_of(np.random.default_rng(1), 5)
    tables = LazyAdam(rate=3.0, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.1, correction=correction)
    found, slots = run(AdamW(learning_rate=0.02, tables=tables), steps)
    value = np.asarray(dict(named_leaves(model()[1]))[NAME], np.float64)
    first, second, read = np.zeros((M, V)), np.zeros((M, V)), np.zeros(M)
    for number, (ids, vectors) in enumerate(steps, start=1):
        grad = summed(ids, vectors)
        for row in set(ids[ids >= 0].tolist()):
            read[row] += 1
            count = number if correction == "run" else read[row]
            first[row] = 0.8 * first[row] + 0.2 * grad[row]
            second[row] = 0.9 * second[row] + 0.1 * grad[row] ** 2
            step = first[row] / (1 - 0.8**count) / (np.sqrt(second[row] / (1 - 0.9**count)) + 1e-3)
            value[row] -= 0.06 * (step + 0.1 * value[row])
    np.testing.assert_allclose(found, value, atol=2e-6)
    np.testing.assert_allclose(slots["first"], first, atol=1e-6)
    np.testing.assert_allclose(slots["second"], second, atol=1e-6)
    assert (slots["first"][5:] == 0).all()


def test_rowwise_adagrad_is_the_dense_rule():
    """All rows at every step in float64, those without gradient too."""
    steps = steps_of(np.random.default_rng(2), 6)
    config = AdamW(learning_rate=0.02, tables=RowwiseAdagrad())
    value = np.asarray(dict(named_leaves(model()[1]))[NAME], np.float64)
    squares = np.zeros(M)
    for ids, vectors in steps:
        grad = summed(ids, vectors)
        squares += (grad**2).mean(-1)
        value -= 0.1 * grad / (np.sqrt(squares) + 1e-8)[:, None]
    for dense in (False, True):
        found, slots = run(config, steps, dense=dense)
        np.testing.assert_allclose(found, value, atol=1e-6)
        np.testing.assert_allclose(slots["squares"], squares, rtol=1e-5)


def test_the_norm_is_that_of_merged_rows():
    ids, vectors = steps_of(np.random.default_rng(3), 1)[0]
    grads = {"a": jnp.full((3,), 2.0), "t": by_rows(ids, vectors)}
    expected = np.sqrt(12.0 + (summed(ids, vectors) ** 2).sum())
    assert float(gradient_norm(grads)) == pytest.approx(expected, rel=1e-6)
    assert float(gradient_norm(scaled(grads, jnp.float32(0.5)))) == pytest.approx(expected / 2, rel=1e-6)


def test_the_first_pattern_that_matches_counts():
    class Two(nnx.Module):
        def __init__(self):
            self.head, self.tail = nnx.List([model()[0]]), model()[0]

    ada, lazy = RowwiseAdagrad(names="head.*"), LazyAdam()
    assert assigned((ada, lazy), Two()) == {"head.0.values": ada, "tail.values": lazy}
    assert assigned((ada,), Two()) == {"head.0.values": ada}
