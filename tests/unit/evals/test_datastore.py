"""A datastore of a run: neighbours as brute force finds them, and the same targets in every row, order and resumed run."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlt.config.check import check_run
from mlt.config.problems import ConfigError
from mlt.config.run import RunConfig, TrainConfig
from mlt.data.loader import DataConfig, load_corpus, open_loader
from mlt.data.mixture import Mixture, Weighted
from mlt.data.neighbours import IDS, PROBABILITIES, Neighbours
from mlt.data.synthetic import SyntheticText
from mlt.errors import UserError
from mlt.evals.datastore import build, search
from mlt.evals.nearest import distribution, neighbours_of_all
from mlt.loss import context_of
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.attention import Attention
from mlt.model.block import Block
from mlt.model.first_layers import first_layers
from mlt.model.lm import LMConfig
from mlt.model.remat import Remat
from mlt.model.stack import Stack
from mlt.nn.param import initialize
from mlt.parallel.mesh import Layout
from mlt.parallel.rules import Rules
from mlt.train.load import load_model
from mlt.train.neighbours import neighbour_fields
from mlt.train.setup import prepare
from mlt.train.state import abstract_batch, abstract_state
from mlt.train.step import jit_train_step
from mlt.verify.material import lively, packed_rows

NONE, FLOAT32 = Remat(mode="none"), jnp.dtype("float32")
ATTENTION, FEED_FORWARD = Block(mixers=(Attention(num_heads=2, head_dim=8),)), Block(mixers=(SwiGLU(d_ff=16),))
MODEL = LMConfig(d_model=16, vocab_size=272, stack=Stack(period=(ATTENTION, FEED_FORWARD), repeats=2))
TWO = Mixture(parts=tuple(Weighted(source=SyntheticText(num_documents=6, mean_words=10, seed=seed)) for seed in (0, 1)))
DATA = DataConfig(source=TWO, sequence_length=16, batch_size=4, shuffle_block_rows=8, validation_fraction=0.2)
K, WIDTH, TEMPERATURE = 12, 5, 3.0


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, saved_run):
    return saved_run(tmp_path_factory.mktemp("runs") / "base", MODEL, DATA, 3)


@pytest.fixture(scope="module")
def made(run_dir):
    """(store, folder of targets, what it says of itself)."""
    store, targets = run_dir.parent / "store", run_dir.parent / "targets"
    build(run_dir, store, say=lambda _: None, window=24, overlap=8, rows=3)
    return store, targets, search(store, targets, say=lambda _: None, neighbours=K, temperature=TEMPERATURE, width=WIDTH)


@pytest.fixture(scope="module")
def data(made):
    return DATA.replace(neighbours=Neighbours(folder=str(made[1]), digest=made[2]["digest"], width=WIDTH))


def test_neighbours_are_those_of_brute_force_without_their_own_entry():
    keys = np.random.default_rng(0).standard_normal((45, 6)).astype(np.float32) + 7
    keys[9], keys[30] = keys[4], keys[4]
    exact = np.square(keys[:, None].astype(np.float64) - keys).sum(-1)
    np.fill_diagonal(exact, np.inf)
    parts = list(neighbours_of_all(keys, 11, queries=16, keys=7))
    assert [part[0] for part in parts] == [0, 16, 32]
    number, distance = (np.concatenate([part[i] for part in parts]) for i in (1, 2))
    np.testing.assert_array_equal(number, np.argsort(exact, axis=1, kind="stable")[:, :11])
    np.testing.assert_allclose(distance, np.sort(exact, axis=1)[:, :11], rtol=1e-5, atol=1e-12)
    # Equal texts stay, the own entry does not.
    assert number[[4, 9], :2].tolist() == [[9, 30], [4, 30]]
    with pytest.raises(ValueError, match="at most 44"):
        next(neighbours_of_all(keys, 45))


@pytest.mark.parametrize("width", [2, 9])
def test_a_distribution_sums_the_weights_of_a_token(width):
    rng = np.random.default_rng(1)
    tokens, distances = rng.integers(0, 4, (8, 7)), np.sort(rng.uniform(0, 9, (8, 7)).astype(np.float32), axis=1)
    tokens[0], distances[1] = 3, 0  # one token alone; equal weights
    ids, probabilities, share = distribution(tokens.astype(np.uint16), distances, 2.0, width)
    for row in range(8):
        mass = collections.Counter()
        for token, distance in zip(tokens[row].tolist(), distances[row].tolist(), strict=True):
            mass[token] += np.exp(-distance / 2.0)
        best = sorted(mass.items(), key=lambda item: (-round(item[1], 9), item[0]))[:width]
        kept = sum(value for _, value in best)
        assert ids[row].tolist() == [token for token, _ in best] + [-1] * (width - len(best))
        expected = [value / kept for _, value in best] + [0.0] * (width - len(best))
        np.testing.assert_allclose(probabilities[row], expected, rtol=1e-6)
        assert share[row] == pytest.approx(kept / sum(mass.values()))


def test_keys_are_the_states_in_front_of_each_token_of_a_document(run_dir, made):
    store, _, _ = made
    keys, tokens, documents, offsets = (np.load(store / f"{n}.npy") for n in ("keys", "next_tokens", "documents", "offsets"))
    corpus, (_, model, _) = load_corpus(DATA), load_model(run_dir)
    whole = [(source, number) for source in corpus.sources for number in range(len(source.held_out_D))]
    kept = [i for i, (source, number) in enumerate(whole) if not source.held_out_D[number]]
    assert sorted(set(documents.tolist())) == kept
    assert len(kept) < len(whole)
    text = {i: s.tokens[s.offsets_D[n] : s.offsets_D[n + 1]] for i, (s, n) in enumerate(whole)}
    assert len(keys) == sum(len(text[i]) - 1 for i in kept)
    for i in kept:
        mine = documents == i
        assert offsets[mine].tolist() == list(range(len(text[i]) - 1))
        np.testing.assert_array_equal(tokens[mine], text[i][1:])
    ids = max((text[i] for i in kept), key=len)
    document = next(i for i in kept if text[i] is ids)
    assert len(ids) > 60
    run = jax.jit(lambda batch: model(context_of(batch, Rules(None), train=False), dtype=FLOAT32, remat=NONE)[0])
    for first, place in ((0, slice(0, 24)), (32, slice(8, 24))):  # the first window; one with 8 tokens seen before
        tokens_BT = ids[None, first : first + 24].astype(np.int32)
        batch = {"tokens": tokens_BT, "segment_ids": np.ones_like(tokens_BT), "positions": np.arange(24, dtype=np.int32)[None]}
        found = keys[documents == document][first + place.start : first + place.stop]
        np.testing.assert_allclose(found, run(batch)[0, place], rtol=0, atol=1e-5)


def test_rows_bring_the_targets_of_their_tokens_and_a_resumed_stream_the_same(made, data):
    store, _, _ = made
    keys, documents, offsets = (
        np.load(store / f"{n}.npy").astype(np.int64 if n != "keys" else float) for n in ("keys", "documents", "offsets")
    )
    next_tokens = np.load(store / "next_tokens.npy").astype(np.int64)
    exact = np.square(keys[:, None] - keys).sum(-1)
    np.fill_diagonal(exact, np.inf)
    corpus = load_corpus(data)
    names = [name for source in corpus.sources for name in source.names]
    entry = {(names[d], o): i for i, (d, o) in enumerate(zip(documents.tolist(), offsets.tolist(), strict=True))}
    loader, batches, state = open_loader(data, corpus), [], None
    for step in range(6):
        state = loader.state() if step == 3 else state
        batches.append(next(loader))
    for number, row in ((0, 0), (3, 2), (5, 1)):
        places = [entry[name, first + i] for name, first, count in loader.rows.documents(4 * number + row) for i in range(count)]
        batch = batches[number]
        np.testing.assert_array_equal(next_tokens[places], batch["targets"][row])
        for place, own in enumerate(places):
            p, q = np.zeros(272), np.zeros(272)
            for near in np.argsort(exact[own])[:K]:
                p[next_tokens[near]] += np.exp(-exact[own, near] / TEMPERATURE)
            np.add.at(q, batch[IDS][row, place], batch[PROBABILITIES][row, place])
            kept = q > 0
            assert 0 < kept.sum() <= WIDTH
            assert p[kept].min() >= p[~kept].max() - 1e-6
            np.testing.assert_allclose(q, np.where(kept, p, 0) / p[kept].sum(), rtol=0, atol=1e-5)
    loader.close()
    again = open_loader(data, corpus, state=state, places=(1, 2))
    for batch in batches[3:]:
        for name, array in next(again).items():
            np.testing.assert_array_equal(array, batch[name][1:3])
    again.close()
    padded = open_loader(data.replace(packing="best_fit"), corpus)
    batch = next(padded)
    padded.close()
    empty = batch["segment_ids"] == 0
    assert empty.any()
    assert not batch[PROBABILITIES][empty].any()
    assert (batch[IDS][empty] == -1).all()
    np.testing.assert_allclose(batch[PROBABILITIES][~empty].sum(-1), 1, rtol=1e-5)


def test_a_step_learns_from_the_neighbours_of_its_batch(data):
    train = TrainConfig(steps=3, compute_dtype="float32", grad_accumulation=2, neighbour_weight=0.4)
    config = RunConfig(model=MODEL, data=data, train=train, remat=NONE)
    check_run(config)
    rules = Layout().rules(jax.devices()[:1])
    setup = prepare(config, rules)
    state, shapes = setup.fresh_state(), abstract_batch(rules, 4, 16, neighbour_fields(config))
    step = jit_train_step(abstract_state(setup.specs, setup.optimizer, rules), setup.optimizer, setup.options)
    compiled = step.lower(state, shapes).compile()
    loader = open_loader(data, setup.corpus)
    for _ in range(2):
        state, metrics = compiled(state, jax.device_put(next(loader), rules.sharding(("batch", "seq"))))
        assert metrics["aux/neighbour_kl"] > 0.1
        mixed = 0.6 * metrics["aux/cross_entropy"] + 0.4 * metrics["aux/neighbour_kl"]
        assert float(metrics["train/loss"]) == pytest.approx(float(mixed), rel=1e-5)
    loader.close()


def test_the_first_layers_compute_what_they_did():
    stack = Stack(head=(FEED_FORWARD,), period=(ATTENTION, FEED_FORWARD), repeats=2, tail=(ATTENTION, FEED_FORWARD))
    model = lively(initialize(MODEL.replace(stack=stack).build(), 0), 1)
    ctx = context_of(packed_rows(np.random.default_rng(0), rows=1, length=20, num_ids=99), Rules(None), train=False)
    blocks = [model.stack.head[0]]
    blocks += [jax.tree.map(lambda leaf, n=n: leaf[n], block) for n in range(2) for block in model.stack.period]
    blocks += list(model.stack.tail)
    counts = (2, 4, 7)  # inside the first repeat, inside the second, all

    @jax.jit
    def streams(x_BTD):
        expected = [x_BTD]
        for block in blocks:
            expected.append(block(expected[-1], ctx, NONE, in_loop=False)[0])
        found = [first_layers(model, count).stream(ctx, dtype=FLOAT32, remat=NONE)[0] for count in counts]
        return [expected[count] for count in counts], found

    for expected, found in zip(*streams(model.embed.table[...][ctx.token_ids]), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)  # two programs, each rounding in its own order
    assert [first_layers(model, count).config.stack.num_layers for count in range(8)] == list(range(8))
    with pytest.raises(ValueError, match="no first 8"):
        first_layers(model, 8)


REFUSED = {
    "another digest": ({"digest": "0123"}, {}, "data.neighbours.digest", "a run's targets do not change"),
    "another width": ({"width": 4}, {}, "data.neighbours.width", "is 5 in"),
    "no folder": ({"folder": "no/such"}, {}, "data.neighbours.folder", "tools/datastore.py"),
    "no weight": ({}, {"neighbour_weight": None}, "train.neighbour_weight", "nothing would read it"),
    "a weight of 2": ({}, {"neighbour_weight": 2.0}, "train.neighbour_weight", "(0, 1]"),
    "no neighbours": (None, {}, "data.neighbours", "nothing to learn"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, data):
    fields, train, path, text = REFUSED[case]
    chosen = None if fields is None else data.neighbours.replace(**fields)
    train = TrainConfig(**{"steps": 1, "neighbour_weight": 0.5, **train})
    config = RunConfig(model=MODEL, data=data.replace(neighbours=chosen), train=train)
    with pytest.raises(ConfigError) as caught:
        check_run(config)
    assert any(text in str(problem) for problem in caught.value.problems if problem.path == path), str(caught.value)


def test_targets_belong_to_their_documents(run_dir, made, data):
    other = load_corpus(DATA.replace(source=SyntheticText(num_documents=9), validation_fraction=0))
    with pytest.raises(UserError, match="was made of the documents"):
        data.neighbours.opened(other)
    with pytest.raises(UserError, match="exists"):
        search(made[0], made[1], say=print, neighbours=3, temperature=1.0)
    for options, text in (({"layer": 9}, "--layer 9"), ({"window": 4, "overlap": 4}, "--overlap 4")):
        with pytest.raises(UserError, match=text):
            build(run_dir, made[0].parent / "no", say=print, **options)
    assert not (made[0].parent / "no").exists()
