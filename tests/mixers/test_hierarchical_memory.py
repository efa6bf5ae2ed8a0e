"""Hierarchical memories against their equations, token by token in float64; which rows a document reads and trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlt.loss import context_of
from mlt.mixers.base import BuildInfo
from mlt.mixers.channel.hierarchical_memory import HierarchicalMemory
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.nn.param import initialize, named_leaves
from mlt.optim.table import named
from mlt.parallel import fetched
from mlt.parallel.rules import Rules
from mlt.train import sparse
from mlt.verify.material import lively, packed_rows

D = 8
INFO = BuildInfo(d_model=D, num_sub_layers=4, vocab_size=16)
CONFIG = HierarchicalMemory(d_ff=6, units=(3, 0, 2), branching=2, max_runs=5)


def drawn(config=CONFIG):
    return lively(initialize(config.build(INFO), 0), 1, std=0.3)


def given(seed: int = 0, rows: int = 2, length: int = 21):
    rng = np.random.default_rng(seed)
    batch = packed_rows(rng, rows=rows, length=length, num_ids=16, clusters=CONFIG.num_clusters, cluster_runs=99)
    return batch, rng.standard_normal((rows, length, D)).astype(np.float32)


@jax.jit
def run(mixer, x, batch):
    return mixer(x, context_of(batch, Rules(None), train=True))


def silu(x):
    return x / (1 + np.exp(-x))


def block(table, cluster: int) -> np.ndarray:
    """Rows of a leaf's path: level 1 has two blocks of 3 units, level 3 eight of 2, and then there is the generic block."""
    if cluster < 0:
        return table[22:27]
    return np.concatenate([table[cluster // 4 * 3 :][:3], table[6 + cluster * 2 :][:2]])


def expected(mixer, x, batch):
    w = {name: np.asarray(leaf, np.float64) for name, leaf in named_leaves(mixer)}
    y, without = np.zeros_like(x, np.float64), 0
    for row in range(len(x)):
        runs, before = 0, None
        for t in np.flatnonzero(batch["segment_ids"][row]):
            cluster = int(batch["rows/clusters"][row, t])
            runs, before = runs + (cluster != before), cluster
            z = x[row, t].astype(np.float64)
            y[row, t] = (silu(z @ w["gate.kernel"]) * (z @ w["up.kernel"])) @ w["down.kernel"]
            if runs > CONFIG.max_runs:
                without += 1
                continue
            for unit in block(w["table"], cluster):
                gate, up, down = unit.reshape(3, D)
                y[row, t] += silu(gate @ z) * (up @ z) * down
    return y, without


def test_each_token_gets_the_blocks_of_its_documents_path():
    mixer, (batch, x) = drawn(), given()
    found, aux = run(mixer, x, batch)
    want, without = expected(mixer, x, batch)
    real = batch["segment_ids"] > 0
    assert (batch["rows/clusters"][real] == -1).any()
    assert 0 < without == int(aux["metric/tokens_without_memory"]) < real.sum() / 2
    np.testing.assert_allclose(np.asarray(found)[real], want[real], atol=1e-5)


def test_a_fresh_memory_is_the_anchor():
    """Down vectors start at zero: before training the layer is its feed-forward part, and no bit else."""
    mixer, (batch, x) = initialize(CONFIG.build(INFO), 0), given()
    plain = initialize(SwiGLU(d_ff=6).build(INFO), 0)
    for name in ("gate", "up", "down"):
        setattr(plain, name, getattr(mixer, name))
    np.testing.assert_array_equal(run(mixer, x, batch)[0], run(plain, x, batch)[0])
    assert np.asarray(mixer.table[...])[:, : 2 * D].std() == pytest.approx(D**-0.5, rel=0.05)


def test_only_fetched_rows_are_trained_and_records_give_the_same():
    trained, (batch, x) = drawn(), given(1)

    def objective(trained, batch):
        y, aux = trained(x, context_of(batch, Rules(None), train=True))
        loss = jnp.sum(jnp.sin(y) * (batch["segment_ids"] > 0)[..., None])
        return loss, (loss, aux)

    @jax.jit
    def both(trained, batch):
        _, _, grads, records = sparse.gradient(objective, ("table",))(trained, batch)
        merged = named(sparse.with_rows(grads, records, trained, Rules(None)))["table"]
        return jax.grad(objective, has_aux=True)(trained, batch)[0].table[...], merged.dense()

    dense, rows = both(trained, batch)
    np.testing.assert_allclose(rows, dense, atol=1e-5)
    batch["rows/clusters"][:] = 5
    dense = np.asarray(both(trained, batch)[0])
    assert np.flatnonzero(dense.any(-1)).tolist() == [3, 4, 5, 16, 17]


def test_a_document_without_a_cluster_reads_the_generic_block():
    mixer, (batch, x) = drawn(), given(2)
    generic = run(mixer, x, {**batch, "rows/clusters": np.full_like(batch["tokens"], -1)})[0]
    del batch["rows/clusters"]
    real = batch["segment_ids"] > 0
    np.testing.assert_allclose(np.asarray(run(mixer, x, batch)[0])[real], np.asarray(generic)[real], atol=1e-6)


def test_runs_are_stretches_of_one_id_and_padding_begins_none():
    rng = np.random.default_rng(3)
    ids, real = rng.integers(-1, 2, (40, 12)).astype(np.int32), rng.random((40, 12)) < 0.8
    slots, found = (np.asarray(part) for part in jax.jit(fetched.runs_of, static_argnums=(0, 3))(Rules(None), ids, real, 4))
    for row in range(40):
        seen: list[int] = []
        for t in range(12):
            if real[row, t] and (not seen or seen[-1] != ids[row, t]):
                seen.append(int(ids[row, t]))
            assert slots[row, t] == min(max(len(seen) - 1, 0), 4)
        assert found[row].tolist() == [*seen[:4], *[fetched.NONE] * (5 - len(seen[:4]))]


@pytest.mark.parametrize(
    ("units", "layers", "d_model", "bank", "read"),
    [((256, 64, 16, 0), 28, 640, 4.6, 18), ((512, 128, 32, 0), 24, 1024, 12.7, 50), ((768, 256, 16, 0), 24, 2048, 21.1, 153)],
)
def test_banks_and_blocks_are_as_large_as_published(units, layers, d_model, bank, read):
    config = HierarchicalMemory(d_ff=1, units=units)
    assert round(3 * d_model * layers * config.bank_units / 1e9, 1) == bank
    assert round(3 * d_model * layers * config.fetched_units / 1e6) == read
    assert config.num_clusters == 65_536
    rows = np.asarray(config.rows(np.array([0, 65_535, -1, -2, 65_536], np.int32)))
    assert rows[0, 0] == 0
    assert rows[1, -1] == config.bank_units - 1
    assert rows[2].tolist() == list(range(config.bank_units, config.bank_units + config.fetched_units))
    assert (rows[3:] == -1).all()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (CONFIG.replace(units=(0, 0)), "at least one level needs some"),
        (CONFIG.replace(units=(3, -1)), "must not be negative"),
        (CONFIG.replace(branching=1), "must be at least 2"),
        (CONFIG.replace(max_runs=0), "must be at least 1"),
        (CONFIG.replace(units=(1,) * 8, branching=16), "ids have 31 bits"),
    ],
)
def test_settings_that_cannot_be_are_refused(config, words):
    assert any(words in problem.rule for problem in config.problems())
