"""Cluster trees of documents: k-means by the book, the same everywhere; and the field of a batch that they make."""

import itertools

import numpy as np
import pytest

from mlt.config.load import load_config
from mlt.config.problems import ConfigError
from mlt.data.cluster_rows import Clusters, RowClusters
from mlt.data.clusters import SCALE, ClusterTree, features_of, fit
from mlt.data.loader import DataConfig, load_corpus, open_loader, validation_batches
from mlt.data.pack import Pieces
from mlt.data.synthetic import SyntheticText
from mlt.errors import UserError
from mlt.train.clusters import cluster_fields, cluster_of, cluster_problems, keep_tree

SIZES = {"width": 16, "rounds": 20, "seed": 0}
CLUSTERS = Clusters(branching=3, depth=2, width=16, generic_share=0.0, max_runs=8)
DATA = DataConfig(source=SyntheticText(num_documents=60, seed=1), sequence_length=96, batch_size=4, clusters=CLUSTERS)


def topics(seed: int, count: int = 40):
    """Documents of four topics, two and two alike: topic 2 a + b draws tokens from vocabularies a and (a, b)."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 4, count)
    own = [
        np.where(rng.random(n) < 0.6, 10 * (k // 2), 100 + 10 * k) + rng.integers(0, 8, n)
        for k, n in zip(kinds, rng.integers(80, 200, count), strict=True)
    ]
    return kinds, np.concatenate(own).astype(np.uint16), np.concatenate([[0], np.cumsum([len(d) for d in own])])


def test_topics_are_found_level_by_level():
    kinds, tokens, offsets = topics(0)
    tree = fit(tokens, offsets, 2, 2, width=64, rounds=20, seed=1)
    leaves = tree.leaves(tokens, offsets)
    assert len({(a, b) for a, b in zip(kinds // 2, leaves // 2, strict=True)}) == 2
    assert len({(a, b) for a, b in zip(kinds, leaves, strict=True)}) == 4
    # New documents of the same topics go where the old ones went.
    others, tokens, offsets = topics(7)
    known = dict(zip(kinds.tolist(), leaves.tolist(), strict=True))
    assert [known[k] for k in others.tolist()] == tree.leaves(tokens, offsets).tolist()


def test_a_leaf_is_the_nearest_child_of_the_nearest_child():
    _, tokens, offsets = topics(2, 25)
    tree = fit(tokens, offsets, 3, 3, **SIZES)
    features = features_of(tokens, offsets, 16)
    np.testing.assert_array_equal(features, np.rint(features))
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), SCALE, rtol=0.01)
    for document, leaf in zip(features, tree.leaves(tokens, offsets), strict=True):
        at = 0
        for level in tree.centroids:
            children = level[at * 3 : at * 3 + 3].astype(np.int64)
            at = at * 3 + int(((children - document.astype(np.int64)) ** 2).sum(1).argmin())
        assert at == leaf


def test_a_fit_depends_on_nothing_but_its_arguments():
    """Nor on how documents are cut into blocks; trees have digests of their content."""
    _, tokens, offsets = topics(3)
    tree, again = (fit(tokens, offsets, 3, 2, **SIZES) for _ in range(2))
    assert tree.digest == again.digest != fit(tokens, offsets, 3, 2, **{**SIZES, "seed": 5}).digest
    alone = [int(tree.leaves(tokens[a:b], np.array([0, b - a]))[0]) for a, b in itertools.pairwise(offsets)]
    assert alone == tree.leaves(tokens, offsets).tolist()


def test_fewer_documents_than_clusters():
    _, tokens, offsets = topics(4, 3)
    tree = fit(tokens, offsets, 4, 3, **SIZES)
    assert len(set(tree.leaves(tokens, offsets).tolist())) == 3
    assert tree.num_clusters == 64


def test_files_and_what_is_refused(tmp_path):
    _, tokens, offsets = topics(5)
    tree = fit(tokens, offsets, 3, 2, **SIZES)
    path = str(tmp_path / "trees" / "tree.npz")
    tree.save(path)
    assert ClusterTree.load(path).digest == tree.digest
    documents = (tokens, offsets[:-1], np.diff(offsets))
    named = CLUSTERS.replace(file=path, digest=tree.digest)
    assert named.tree(*documents).digest == tree.digest
    with pytest.raises(UserError, match=rf"tree.npz: has the digest {tree.digest}, and data.clusters.digest is 1234"):
        named.replace(digest="1234").tree(*documents)
    with pytest.raises(UserError, match=r"has branching 3 and depth 2, and data\.clusters says 3 and 3"):
        named.replace(depth=3).tree(*documents)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        ClusterTree.load(path + "x")
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"bad.npz: is no cluster tree"):
        ClusterTree.load(str(tmp_path / "bad.npz"))
    (problem,) = list(named.replace(digest=None).problems())
    assert (problem.path, problem.value) == ("digest", None)
    with pytest.raises(ConfigError, match=r"data\.clusters\.file.*does not exist"):
        DATA.replace(clusters=named.replace(file=path + "x")).check_files()


@pytest.fixture(scope="module")
def corpus():
    return load_corpus(DATA)


def test_a_batch_has_the_leaf_of_each_tokens_document(corpus):
    loader = open_loader(DATA, corpus)
    (leaves,) = corpus.clustered(CLUSTERS).leaves
    names = {name: int(leaf) for name, leaf in zip(corpus.sources[0].names, leaves, strict=True)}
    assert len(set(names.values())) > 3
    for step in range(3):
        batch = next(loader)
        for place in range(4):
            found = batch["rows/clusters"][place]
            want = [names[name] for name, _, count in loader.rows.documents(4 * step + place) for _ in range(count)]
            assert found.tolist() == want
            assert loader.rows[4 * step + place]["rows/clusters"].tolist() == want
    loader.close()
    for batch in validation_batches(DATA, corpus):
        assert batch["rows/clusters"].dtype == np.int32
        np.testing.assert_array_equal(batch["rows/clusters"] == -1, batch["segment_ids"] == 0)


def test_a_run_keeps_its_tree_and_takes_no_other(corpus, tmp_path):
    config = load_config("configs/families/hierarchical_memories.py")
    config, path = config.replace(data=DATA), tmp_path / "clusters.npz"
    keep_tree(path, config, corpus, write=False)
    assert not path.exists()
    keep_tree(path, config, corpus, write=True)
    keep_tree(path, config, corpus, write=True)
    tree = corpus.clustered(CLUSTERS).tree
    assert ClusterTree.load(str(path)).digest == tree.digest
    source = corpus.sources[0]
    first = source.tokens[: source.offsets_D[1]]
    assert cluster_of(tree, first.astype(np.int32)) == corpus.clustered(CLUSTERS).leaves[0][0]
    assert cluster_of(None, first) == -1
    other = config.replace(data=DATA.replace(clusters=CLUSTERS.replace(seed=3)))
    with pytest.raises(UserError, match=rf"clustered by a tree with the digest {tree.digest}, and this start has"):
        keep_tree(path, other, corpus, write=True)


def test_no_clusters_no_field(corpus):
    plain = DATA.replace(clusters=None)
    assert "rows/clusters" not in open_loader(plain, corpus).rows[0]
    assert "rows/clusters" not in validation_batches(plain, corpus)[0]


def rows_of(share: float, max_runs: int, lengths) -> np.ndarray:
    """200 rows of 30 pieces, each of another document and leaf."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    writer = RowClusters(np.arange(30, dtype=np.int32), offsets, max_runs, share, 0, 0)
    rows = np.empty((200, offsets[-1] + 2), np.int32)
    for index, row in enumerate(rows):
        writer.write(row, Pieces(offsets[:-1], np.asarray(lengths)), index)
    return rows


def test_the_generic_share_is_drawn_for_each_row():
    rows = rows_of(0.25, 64, [3] * 30)
    generic = rows[:, :-2:3] == -1
    assert generic.mean() == pytest.approx(0.25, abs=0.02)
    assert generic.mean(0).min() > 0.1
    assert generic.mean(0).max() < 0.4
    np.testing.assert_array_equal(rows, rows_of(0.25, 64, [3] * 30))
    assert (rows_of(1.0, 64, [3] * 30) == -1).all()
    assert (rows[:, -2:] == -1).all()


def test_a_row_has_no_more_runs_than_it_may():
    for share in (0.0, 0.25):
        rows = rows_of(share, 8, [2] * 30)[:, :-2]
        runs = 1 + (np.diff(rows, axis=1) != 0).sum(1)
        assert runs.max() == 8
        assert (rows[:, -1] == -1).all()
    assert rows_of(0.0, 8, [2] * 30)[0, :14].tolist() == [leaf for leaf in range(7) for _ in range(2)]
    assert rows_of(0.0, 30, [2] * 30)[0, :60].tolist() == [leaf for leaf in range(30) for _ in range(2)]


def test_model_and_data_must_agree():
    config = load_config("configs/families/hierarchical_memories.py")
    assert not list(cluster_problems(config))
    assert list(cluster_fields(config)) == ["rows/clusters"]

    def told(**changes):
        clusters = config.data.clusters.replace(**changes) if changes else None
        return [(p.path, p.rule) for p in cluster_problems(config.replace(data=config.data.replace(clusters=clusters)))]

    ((path, rule),) = told()
    assert path == "data.clusters"
    assert "every document would read the generic block" in rule
    assert told(branching=5) == [("model.stack.period[0].mixers[1].branching", "is for children: 4, and data.clusters has 5")]
    assert told(depth=3) == [("model.stack.period[0].mixers[1].units", "is for levels: 2, and data.clusters has 3")]
    assert told(max_runs=9)[0][1].startswith("must be at least data.clusters.max_runs = 9")
    other = load_config("configs/families/lave.py")
    data = other.data.replace(clusters=config.data.clusters)
    assert [p.rule for p in cluster_problems(other.replace(data=data))] == ["is read by no layer of the model"]
