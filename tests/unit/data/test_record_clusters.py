"""Clusters that records bring: every value a file may hold, and the same leaves however rows are made, mixed and shared out."""

import json

import numpy as np
import pytest

from mlt.config.dump import from_yaml, to_yaml
from mlt.config.load import load_config
from mlt.data.array_records import ArrayRecords, example_class
from mlt.data.arrow_files import ArrowFiles
from mlt.data.cluster_rows import FIELD, RecordClusters
from mlt.data.json_lines import JsonLines
from mlt.data.loader import DataConfig, load_corpus, open_loader, validation_batches
from mlt.data.mixture import Mixture, Stage, Weighted
from mlt.data.parquet import Parquet
from mlt.data.sources import BadRecord
from mlt.data.synthetic import SyntheticText
from mlt.data.text_files import TextFiles
from mlt.data.token_cache import TokenCache
from mlt.errors import UserError
from mlt.train.clusters import check_cluster, cluster_fields, cluster_of, cluster_problems, keep_tree, kept_tree

CLUSTERS = RecordClusters(branching=3, depth=2, generic_share=0.0, max_runs=8)


@pytest.mark.parametrize(("value", "leaf"), [(0, 0), (8, 8), (-1, -1), ([0, 0], 0), ([2, 1], 7), ((1, 2), 5)])
def test_leaves_and_paths(value, leaf):
    assert CLUSTERS.leaf(value, "x") == leaf


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (9, r"holds 9, which is no leaf: data\.clusters has 0 to 8 \(branching = 3, depth = 2\), and -1 for a document of no"),
        (-2, "holds -2, which is no leaf"),
        (10**30, r"holds 1000000000000000000000000000000, which is no leaf"),
        (None, "holds null, neither a whole number nor a list of them"),
        ("4", "holds '4', neither"),
        (4.0, r"holds 4\.0, neither"),
        (True, "holds True, neither"),
        ({"leaf": 4}, "holds {'leaf': 4}, neither"),
        ([1], r"holds \[1\], which is no path: it must have data\.clusters\.depth = 2 whole numbers, each from 0 to 2\."),
        ([1, 2, 0], r"holds \[1, 2, 0\], which is no path"),
        ([0, 3], r"holds \[0, 3\], which is no path"),
        ([-1, 0], r"holds \[-1, 0\], which is no path"),
        ([1, None], r"holds \[1, None\], which is no path"),
        ([1, True], r"holds \[1, True\], which is no path"),
        (list(range(99)), r"holds \[0, 1, 2, .{30}\.\.\., which is no path"),
    ],
)
def test_what_is_neither(value, message):
    with pytest.raises(BadRecord, match=f"^a:1: field 'leaf' {message}.*Repair or remove the record"):
        CLUSTERS.leaf(value, "a:1: field 'leaf'")


def records(first: int, count: int):
    """Texts of several lengths, leaves in both forms."""
    leaves = [(7 * number) % 10 - 1 for number in range(first, first + count)]
    forms = [leaf if leaf % 2 else [leaf // 3, leaf % 3] for leaf in leaves]
    texts = [f"document {number} " * (1 + number % 5) for number in range(first, first + count)]
    return [{"text": text, "leaf": form} for text, form in zip(texts, forms, strict=True)], leaves


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return JsonLines(paths=(str(path),), cluster_field="leaf")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """(config of two mixed sources, path of the first, leaf of each document by name)"""
    from array_record.python import array_record_module

    folder = tmp_path_factory.mktemp("mixed")
    (lines, leaves), (others, more) = records(0, 60), records(60, 30)
    writer = array_record_module.ArrayRecordWriter(str(folder / "b.array_record"), "group_size:1")
    for row in others:
        writer.write(json.dumps({"text": row["text"], "path": row["leaf"]}).encode())
    writer.close()
    packed = ArrayRecords(paths=(str(folder / "b.array_record"),), record="json", cluster_field="path")
    parts = (Weighted(source=write_lines(folder / "a.jsonl", lines), weight=2.0), Weighted(source=packed))
    source = Mixture(parts=parts, stages=(Stage(from_row=9, weights=(1.0, 3.0)),))
    config = DataConfig(source=source, sequence_length=48, batch_size=4, clusters=CLUSTERS, validation_fraction=0.1)
    names = {f"{folder}/a.jsonl:{1 + number}": leaf for number, leaf in enumerate(leaves)}
    return config, folder / "a.jsonl", names | {f"{folder}/b.array_record:{number}": leaf for number, leaf in enumerate(more)}


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_rows_have_the_leaves_of_the_records(mixed, packing):
    """On one host, on two, and taken up again in the middle."""
    config, _, leaves = mixed
    config = config.replace(packing=packing, shuffle_block_rows=8)
    assert not list(config.problems())
    corpus = load_corpus(config)
    loader = open_loader(config, corpus)
    batches, states = [], [loader.state()]
    for step in range(8):
        batches.append(next(loader))
        states.append(loader.state())
        for place, found in enumerate(batches[-1][FIELD]):
            want = [leaves[name] for name, _, count in loader.rows.documents(4 * step + place) for _ in range(count)]
            assert found.tolist() == want + [-1] * (48 - len(want))
    assert len({leaf for batch in batches for leaf in np.unique(batch[FIELD])}) == 10
    hosts = [open_loader(config, corpus, state=states[3], host_index=host, host_count=2) for host in range(2)]
    for batch in batches[3:]:
        np.testing.assert_array_equal(np.concatenate([next(host)[FIELD] for host in hosts]), batch[FIELD])
    for opened in (loader, *hosts):
        opened.close()
    for batch in validation_batches(config, corpus):
        assert (batch[FIELD][batch["segment_ids"] == 0] == -1).all()
        assert batch[FIELD].max() > 0


def test_other_clusters_are_other_data_but_not_other_tokens(mixed, tmp_path):
    config, path, _ = mixed
    cached = config.replace(cache=TokenCache(folder=str(tmp_path / "cache")))
    corpus = load_corpus(cached)
    state = open_loader(cached, corpus).state()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[3]["leaf"] = 8 - corpus.clustered(CLUSTERS).leaves[0][3].item()
    changed = config.source.parts[0].replace(source=write_lines(tmp_path / "a.jsonl", rows))
    changed = cached.replace(source=config.source.replace(parts=(changed, config.source.parts[1])))
    other = load_corpus(changed)
    assert other.hash != corpus.hash
    assert [a.hash == b.hash for a, b in zip(corpus.sources, other.sources, strict=True)] == [False, True]
    assert len(list((tmp_path / "cache").glob("*.ids"))) == 2
    with pytest.raises(UserError, match=r"differ from those of the saved run.*clusters in their records"):
        open_loader(changed, other, state=state)
    plain = load_corpus(config.replace(clusters=None))
    assert plain.sources[0].hash not in (corpus.sources[0].hash, other.sources[0].hash)


def test_bad_records_are_bounded_and_named(tmp_path):
    rows, leaves = records(0, 20)
    rows[2] = {"text": "no leaf"}
    rows[5]["leaf"] = 9
    rows[11]["leaf"] = "4"
    rows[12] = {"text": "", "leaf": "no text, so it is not looked at"}
    config = DataConfig(source=write_lines(tmp_path / "a.jsonl", rows), sequence_length=8, batch_size=1, clusters=CLUSTERS)
    config = config.replace(validation_fraction=0.0)
    with pytest.raises(UserError, match=r"a\.jsonl, line 3: no field 'leaf' \(fields present: 'text'\)\. Set cluster_field= of"):
        load_corpus(config)
    with pytest.raises(
        UserError, match=r"(?s)more than data\.max_bad_records=2.*a\.jsonl:6: field 'leaf' holds 9, which is no leaf"
    ):
        load_corpus(config.replace(max_bad_records=2))
    corpus = load_corpus(config.replace(max_bad_records=3))
    assert corpus.bad_records == 3
    kept = [leaf for number, leaf in enumerate(leaves) if number not in (2, 5, 11, 12)]
    assert corpus.clustered(CLUSTERS).leaves[0].tolist() == kept
    assert corpus.clustered(CLUSTERS).tree is None


def test_examples_bring_one_number_or_a_path(tmp_path):
    from array_record.python import array_record_module

    path = tmp_path / "a.array_record"
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for numbers in ([5], [2, 1], [], None):
        example = example_class()()
        example.features.feature.add(key="text").value.bytes_list.value.append(b"words")
        if numbers is not None:
            example.features.feature.add(key="leaf").value.int64_list.value.extend(numbers)
        writer.write(example.SerializeToString())
    writer.close()
    documents = ArrayRecords(paths=(str(path),), record="example", cluster_field="leaf").documents()
    assert [documents.clusters.read(number) for number in range(3)] == [("words", 5), ("words", [2, 1]), ("words", None)]
    with pytest.raises(BadRecord, match=r"record:3: no feature 'leaf' \(present: 'text'\)\. Set cluster_field="):
        documents.clusters.read(3)
    # As TensorFlow writes it: features {"leaf": int64_list {value: 7}}, packed.
    packed = bytes([0x0A, 0x0F, 0x0A, 0x0D, 0x0A, 0x04, *b"leaf", 0x12, 0x05, 0x1A, 0x03, 0x0A, 0x01, 0x07])
    (entry,) = example_class().FromString(packed).features.feature
    assert (entry.key, list(entry.value.int64_list.value)) == ("leaf", [7])


@pytest.mark.parametrize("kind", [Parquet, ArrowFiles])
def test_columns_of_tables(tmp_path, kind):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"text": ["one", "two", "three"], "leaf": [4, None, 8], "path": [[1, 2], [0, 0], None], "word": ["a", "b", "c"]}
    table, path = pyarrow.table(columns), tmp_path / ("a.parquet" if kind is Parquet else "a.arrow")
    if kind is Parquet:
        parquet.write_table(table, path, row_group_size=2)
    else:
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)

    def found(column):
        documents = kind(paths=(str(path),), cluster_column=column).documents()
        assert list(documents) == columns["text"]
        return [documents.clusters.read(row) for row in (2, 0, 1)]

    assert found("leaf") == [("three", 8), ("one", 4), ("two", None)]
    assert found("path") == [("three", None), ("one", [1, 2]), ("two", [0, 0])]
    with pytest.raises(
        UserError, match=r"no column 'leaves' \(columns present: 'text', .*\)\. Set cluster_column= of the source"
    ):
        found("leaves")
    with pytest.raises(UserError, match=r"column 'word' holds string, neither whole numbers nor lists of them\. Set"):
        found("word")
    assert kind(paths=(str(path),)).documents().clusters is None


def test_sources_and_clusters_must_agree(tmp_path):
    lines = JsonLines(paths=("a.jsonl",))
    data = DataConfig(source=lines.replace(cluster_field="leaf"), sequence_length=8, batch_size=1, clusters=CLUSTERS)

    def told(**changes):
        return [(problem.path, problem.rule) for problem in data.replace(**changes).problems()]

    assert told() == []
    assert told(clusters=None) == [("source.cluster_field", "is read with such clusters alone")]
    assert told(source=lines) == [("source.cluster_field", "names no field, and data.clusters takes clusters from the records")]
    texts = Mixture(parts=(Weighted(source=data.source), Weighted(source=TextFiles(paths=("a.txt",)))))
    ((path, rule),) = told(source=texts)
    assert (path, rule.partition(",")[0]) == ("source.parts[1].source", "brings no clusters")
    plain = ArrayRecords(paths=("a",), cluster_field="leaf")
    assert [problem.path for problem in plain.problems()] == ["cluster_field"]
    assert from_yaml(to_yaml(data)) == data
    with pytest.raises(UserError, match="SyntheticText names no field"):
        load_corpus(data.replace(source=SyntheticText(num_documents=4)))


def test_a_run_with_such_clusters_keeps_no_tree(mixed, tmp_path):
    config = load_config("configs/families/hierarchical_memories.py")
    clusters = RecordClusters(branching=4, depth=2, max_runs=8)
    config = config.replace(data=mixed[0].replace(clusters=clusters))
    assert not list(cluster_problems(config))
    assert list(cluster_fields(config)) == [FIELD]
    keep_tree(tmp_path / "clusters.npz", config, load_corpus(config.data), write=True)
    assert not (tmp_path / "clusters.npz").exists()
    assert kept_tree(tmp_path, config) is None
    assert cluster_of(None, np.arange(3)) == -1
    for leaf in (None, -1, 0, 15):
        check_cluster(config, leaf)
    for leaf, where, message in (
        (16, config, "must be a leaf, 0 to 15, or -1"),
        (-2, config, "must be a leaf"),
        (0, load_config("configs/families/lave.py"), "the run's documents have no clusters"),
    ):
        with pytest.raises(UserError, match=f"--cluster {leaf}: {message}"):
            check_cluster(where, leaf)
