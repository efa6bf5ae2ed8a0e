"""Collision statistics: counted as a dictionary of tuples counts them, near chance, and in the report of a run."""

import collections
import json

import jax
import numpy as np

from mlt.config.load import load_config
from mlt.nn.ngram_collisions import collisions
from mlt.nn.ngram_hash import NgramHash, multipliers, ngram_tables, split_words
from mlt.parallel.mesh import Layout
from mlt.report.page import write_report
from mlt.run_paths import RunPaths
from mlt.train.collisions import write_collisions
from mlt.train.setup import prepare

TABLES = ngram_tables((0,), (300, 300, 300), 2)[0]
TOKEN_MAP = np.arange(1000, dtype=np.int32) // 3
HASH = NgramHash(TABLES, split_words(multipliers(334, 4, 0)), TOKEN_MAP, 2, cross_document=False)


def sample() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    ids = np.minimum(rng.geometric(0.05, (3, 80)), 999).astype(np.int32)
    ids[0, 7] = -1
    segments = np.repeat([[1, 2, 3, 0]], [30, 1, 40, 9], axis=1) * np.ones((3, 1), int)
    return ids, segments.astype(np.int32)


def plain_ngrams(ids: np.ndarray, segments: np.ndarray, order: int) -> list[tuple[int, ...] | None]:
    """Every token's n-gram of compressed ids, pads where its document has no token."""
    found: list[tuple[int, ...] | None] = []
    for row, segment in zip(ids, segments, strict=True):
        for t in range(len(row)):
            gram, known = [], True
            for k in range(order):
                known = known and t - k >= 0 and row[t - k] >= 0 and segment[t - k] == segment[t]
                gram.append(int(TOKEN_MAP[row[t - k]] if known else TOKEN_MAP[2]))
            found.append(tuple(gram) if row[t] >= 0 and segment[t] > 0 else None)
    return found


def test_shares_are_those_of_a_plain_count():
    ids, segments = sample()
    rows = HASH.rows(ids, segments).reshape(-1, 6)
    for place, got in enumerate(collisions(HASH, ids, segments)):
        grams = plain_ngrams(ids, segments, got.order)
        of_gram = {gram: tuple(rows[i, 2 * place : 2 * place + 2]) for i, gram in enumerate(grams) if gram is not None}
        heads = [collections.Counter(of[head] for of in of_gram.values()) for head in range(2)]
        together = collections.Counter(of_gram.values())
        assert got.ngrams == len(of_gram)
        shared = [np.mean([heads[head][of[head]] > 1 for of in of_gram.values()]) for head in range(2)]
        np.testing.assert_allclose(got.shared, np.mean(shared))
        np.testing.assert_allclose(got.lost, np.mean([together[of] > 1 for of in of_gram.values()]))
        assert got.touched == len(heads[0]) + len(heads[1])
        sizes = TABLES.primes[place]
        assert got.rows == sum(sizes)
        chance = [1 - (1 - 1 / size) ** (got.ngrams - 1) for size in sizes]
        np.testing.assert_allclose(got.shared_by_chance, np.mean(chance))
        np.testing.assert_allclose(got.lost_by_chance, 1 - (1 - 1 / (sizes[0] * sizes[1])) ** (got.ngrams - 1), rtol=1e-6)


def test_hashes_collide_as_often_as_chance_has_it():
    ids = np.random.default_rng(1).integers(0, 1000, (20, 500)).astype(np.int32)
    big = NgramHash(ngram_tables((0,), (9000, 9000), 4)[0], HASH.words_N2[:3], TOKEN_MAP, 2, cross_document=False)
    for got in collisions(big, ids, np.ones_like(ids)):
        # The share of about 10,000 in each of four tables: five standard deviations are 0.013.
        assert abs(got.shared - got.shared_by_chance) < 0.013
        assert got.lost == 0


def test_padding_alone_has_no_n_grams():
    ids, segments = sample()
    (got, *_) = collisions(HASH, ids, 0 * segments)
    assert (got.ngrams, got.shared, got.lost, got.touched) == (0, 0.0, 0.0, 0)


def test_a_run_writes_them_and_its_report_shows_them(tmp_path):
    paths, config = RunPaths(tmp_path), load_config("tests/faults/tiny.py")
    engram = load_config("configs/quickstart.py").model.stack.head[0].mixers[0]
    stack = config.model.stack
    with_engram = stack.replace(head=(stack.period[0].replace(mixers=(engram,)),))
    rules = Layout().rules(jax.devices()[:1])
    write_collisions(paths.collisions_path, prepare(config, rules))
    assert not paths.collisions_path.exists()
    config = config.replace(model=config.model.replace(stack=with_engram))
    write_collisions(paths.collisions_path, prepare(config, rules))
    told = json.loads(paths.collisions_path.read_text())
    assert [(row["layer"], row["order"]) for row in told["orders"]] == [("head[0].mixers[0]", 2), ("head[0].mixers[0]", 3)]
    paths.config_path.write_text("")
    page = write_report(tmp_path).read_text()
    assert "Hash collisions" in page
    assert f"{told['orders'][0]['ngrams']:,}" in page
