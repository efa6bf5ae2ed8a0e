"""Every source: deterministic random access, and one clear message for each way the input can be wrong."""

import gzip
import hashlib
import importlib.util
import json
import pkgutil
import platform
import sysconfig

import pytest

import mlt.data
from mlt.config.problems import ConfigError
from mlt.data.array_records import ArrayRecords, example_class
from mlt.data.arrow_files import ArrowFiles
from mlt.data.json_lines import JsonLines
from mlt.data.parquet import Parquet
from mlt.data.sources import BadRecord, Source, require_package
from mlt.data.stdlib_source import PythonStdlib
from mlt.data.synthetic import SyntheticText
from mlt.data.text_files import TextFiles
from mlt.errors import UserError


def write_array_record(path, records):
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def write_parquet(path, texts, column="text", row_group_size=None):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), column: texts}), path, row_group_size=row_group_size)


def write_arrow(path, texts, opener="new_stream", rows=None):
    import pyarrow

    table = pyarrow.table({"text": texts})
    with pyarrow.OSFile(str(path), "wb") as file, getattr(pyarrow.ipc, opener)(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


def write_saved_dataset(folder, parts):
    """What `Dataset.save_to_disk` of the package datasets writes, as far as it matters."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05}-of-{len(parts):05}.arrow" for number in range(len(parts))]
    for name, texts in zip(names, parts, strict=True):
        write_arrow(folder / name, texts)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def all_sources() -> list[type[Source]]:
    for module in pkgutil.iter_modules(mlt.data.__path__):
        importlib.import_module(f"mlt.data.{module.name}")
    found, queue = [], [Source]
    while queue:
        below = [cls for cls in queue.pop().__subclasses__() if cls.__module__.startswith("mlt.")]
        found += below
        queue += below
    return found


@pytest.fixture
def example_files(tmp_path, monkeypatch):
    """The files that the examples of file sources name."""
    (tmp_path / "books" / "deep").mkdir(parents=True)
    (tmp_path / "books" / "b.txt").write_text("zwei\n", encoding="utf-8")
    (tmp_path / "books" / "deep" / "a.txt").write_text("größer\n", encoding="utf-8")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n', encoding="utf-8")
    write_array_record(tmp_path / "data" / "x.array_record", [b"one", b"two"])
    if importlib.util.find_spec("pyarrow"):
        write_parquet(tmp_path / "data" / "x.parquet", ["one", "two"])
        write_saved_dataset(tmp_path / "data" / "saved", [["one"], ["two"]])
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("kind", all_sources(), ids=lambda kind: kind.__name__)
def test_example_is_deterministic_random_access(kind, example_files):
    source = kind.example()
    if kind in (Parquet, ArrowFiles):
        pytest.importorskip("pyarrow")
    assert list(source.file_problems()) == []
    documents, again = source.documents(), kind.example().documents()
    assert len(documents) > 1
    assert len(set(documents.names)) == len(documents)
    texts = list(documents)
    assert [again[index] for index in reversed(range(len(again)))] == texts[::-1]
    assert list(again.names) == list(documents.names)
    assert all(text for text in texts)


@pytest.fixture
def fake_stdlib(tmp_path, monkeypatch):
    """A small standard library with one file of every kind the source treats differently."""
    files = {
        "zeta.py": b"def zeta():\n    return alpha\n",
        "package/alpha.py": b"import zeta\n",
        "package/copy_of_zeta.py": b"def zeta():\n    return alpha\n",
        "package/empty.py": b"",
        "test/test_zeta.py": b"assert zeta\n",
        "package/tests/test_alpha.py": b"assert alpha\n",
        "site-packages/numpy.py": b"installed = True\n",
        "_sysconfigdata_x.py": b"machine = True\n",
        "latin.py": b"name = 'caf\xe9 au lait and more text'\n",
        "table.py": b"1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, abc\n",
        "long.py": b"line = line\n" * 100,
        "notes.txt": b"not python\n",
    }
    for name, data in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    paths = dict(sysconfig.get_paths(), stdlib=str(tmp_path))
    monkeypatch.setattr(sysconfig, "get_path", paths.get)


def test_stdlib_takes_each_content_once_and_only_library_code(fake_stdlib):
    documents = PythonStdlib(max_file_bytes=500).documents()
    # copy_of_zeta.py has the same content as zeta.py and comes first by path.
    assert list(documents.names) == ["long.py", "package/alpha.py", "package/copy_of_zeta.py"]
    assert documents[0] == "line = line\n" * 41  # 500 bytes hold 41 whole lines
    assert f"{platform.python_implementation()} {platform.python_version()}" in documents.origin


def test_stdlib_tests_and_tables_on_request(fake_stdlib):
    names = set(PythonStdlib(include_tests=True, max_symbol_share=1.0).documents().names)
    assert {"test/test_zeta.py", "package/tests/test_alpha.py", "table.py"} <= names
    assert not {"site-packages/numpy.py", "_sysconfigdata_x.py", "latin.py", "package/empty.py"} & names


def test_stdlib_budget(fake_stdlib):
    documents = PythonStdlib(max_bytes=45).documents()
    assert sorted(documents) == ["def zeta():\n    return alpha\n", "import zeta\n"]


def test_real_stdlib_is_large_and_within_budget():
    documents = PythonStdlib(max_bytes=300_000).documents()
    size = sum(len(text.encode()) for text in documents)
    assert 200_000 < size <= 300_000
    assert list(documents.names) == sorted(documents.names)


def test_a_part_of_the_stdlib_is_not_the_part_that_is_held_out():
    """Validation takes the documents whose content hashes lowest; a budget must not take the same ones first."""

    def held_out(documents) -> float:
        firsts = [hashlib.blake2b(text.encode(), digest_size=16).digest()[0] for text in documents]
        return sum(first < 64 for first in firsts) / len(firsts)

    assert held_out(PythonStdlib().documents()) == pytest.approx(0.25, abs=0.1)
    assert held_out(PythonStdlib(max_bytes=1_000_000).documents()) < 0.5


def test_stdlib_without_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path)}.get)
    (problem,) = PythonStdlib().file_problems()
    assert str(tmp_path) in problem.rule
    with pytest.raises(UserError, match="TextFiles or JsonLines"):
        PythonStdlib().documents()


def test_text_files_order_hidden_and_repeats(tmp_path, monkeypatch):
    for name in ("b.md", "a.md", "sub/c.md", ".git/d.md", "sub/.e.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    assert list(TextFiles(paths=(".",)).documents()) == ["a.md", "b.md", "sub/c.md"]
    assert list(TextFiles(paths=("sub", "*.md", "./a.md")).documents()) == ["sub/c.md", "a.md", "b.md"]
    assert list(TextFiles(paths=("**/c.md",)).documents().names) == ["sub/c.md"]


def test_missing_files_are_all_named_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for source in (
        TextFiles(paths=("gone.txt", "*.txt", "empty")),
        JsonLines(paths=("gone.txt", "*.txt", "empty")),
    ):
        assert [str(problem).split(", looked")[0] for problem in source.file_problems()] == [
            "paths[0] = 'gone.txt': does not exist",
            "paths[1] = '*.txt': matches no file",
            "paths[2] = 'empty': is a folder with no file in it",
        ]
        with pytest.raises(UserError, match=r"(?s)gone\.txt.*\*\.txt.*empty"):
            source.documents()


def test_text_file_not_utf8_names_file_and_byte(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xc3\xa9 caf\xe9 au lait")
    documents = TextFiles(paths=(str(path),)).documents()
    with pytest.raises(UserError, match=r"latin\.txt: not UTF-8 at byte 9 \(value 0xe9"):
        documents[0]


def test_text_files_keep_every_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes("a\r\nb\n\n é\x00 ".encode())
    assert TextFiles(paths=(str(tmp_path),)).documents()[0] == "a\r\nb\n\n é\x00 "


def test_json_lines_read_in_any_order(tmp_path):
    texts = ["one", "zwei\nLinien", "", "é\u2028日本", "five"]
    lines = [json.dumps({"id": 1, "body": text}, ensure_ascii=index % 2 == 0) for index, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_bytes(("\n\r\n   \n".join(lines[:3]) + "\r\n").encode())
    (tmp_path / "b.jsonl").write_bytes("\n".join(lines[3:]).encode())  # no line end: fine if the JSON is whole
    documents = JsonLines(paths=(str(tmp_path / "*.jsonl"),), field="body").documents()
    assert [documents[index] for index in (4, 0, 3, 2, 1)] == [texts[index] for index in (4, 0, 3, 2, 1)]
    assert documents.names[3] == f"{tmp_path / 'b.jsonl'}:1"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut of', r"line 3: not valid JSON: Unterminated string.*looks truncated"),
        (b'{"text": "a",}\n', r"line 3: not valid JSON: .*\(column 1\d of 14\)\. Each line"),
        (b'["text"]\n', r"line 3: holds a JSON list, not an object"),
        (b'{"txt": "a", "id": 1}\n', r"line 3: no field 'text' \(fields present: 'txt', 'id'\)"),
        (b"{}\n", r"line 3: no field 'text' \(fields present: none\)"),
        (b'{"text": 17}\n', r"line 3: field 'text' holds 17, not a string"),
        (b'{"text": null}\n', r"line 3: field 'text' holds null, not a string"),
        (b'{"text": "ab\\ud800c"}\n', r"line 3: field 'text' holds half a surrogate pair at character 2"),
        (b'{"text": "ab\xff"}\n', r"line 3: not UTF-8 at byte 30 \(value 0xff"),
        (b"[" * 100_000 + b"\n", r"line 3: .*(nested too deeply|not valid JSON)"),
    ],
)
def test_bad_json_line_names_file_line_and_fault(tmp_path, line, message):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line)
    documents = JsonLines(paths=(str(path),)).documents()
    assert documents[0] == "good"
    with pytest.raises(BadRecord, match=r"(?s)data\.jsonl, " + message):
        documents[1]


def test_synthetic_text_is_an_order_two_chain():
    source = SyntheticText(num_documents=200, seed=3, mean_words=100)
    documents = source.documents()
    successors: dict[tuple[str, str], set[str]] = {}
    for text in documents:
        words = text.removesuffix(".\n").split(" ")
        for first, second, third in zip(words, words[1:], words[2:], strict=False):
            successors.setdefault((first, second), set()).add(third)
    assert max(len(after) for after in successors.values()) <= 4
    lengths = [len(text.split()) for text in documents]
    assert min(lengths) >= 1
    assert max(lengths) > 200
    assert list(SyntheticText(num_documents=200, seed=4, mean_words=100).documents()) != list(documents)
    assert documents[7] == SyntheticText(num_documents=8, seed=3, mean_words=100).documents()[7]


def test_synthetic_text_never_changes():
    """Pinned: another text on another platform or numpy version would make saved positions meaningless."""
    text = SyntheticText(num_documents=1, seed=0, mean_words=4).documents()[0]
    assert text == "had little now little them no them as made down more all down more out.\n"


TEXTS = ["one", "zwei\nLinien", "größer", "vier", "", "six", "seven"]


def compress(path, data):
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data))
    else:
        path.write_bytes(pytest.importorskip("pyarrow").compress(data, codec="zstd", asbytes=True))


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_compressed_files_read_like_plain_ones(tmp_path, suffix):
    lines = "\n\n".join(json.dumps({"text": text}) for text in TEXTS)
    (tmp_path / "plain.jsonl").write_text(lines)
    compress(tmp_path / f"a.jsonl.{suffix}", lines.encode())
    compress(tmp_path / f"b.txt.{suffix}", "größer\n".encode())
    plain = JsonLines(paths=(str(tmp_path / "plain.jsonl"),)).documents()
    documents = JsonLines(paths=(str(tmp_path / f"a.jsonl.{suffix}"),)).documents()
    assert list(documents) == list(plain) == TEXTS
    assert [documents[index] for index in (6, 0, 3, 3, 2)] == [TEXTS[index] for index in (6, 0, 3, 3, 2)]
    assert documents.names[2].endswith(f"a.jsonl.{suffix}:5")
    assert list(TextFiles(paths=(str(tmp_path / f"b.txt.{suffix}"),)).documents()) == ["größer\n"]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_damaged_compressed_files_are_named(tmp_path, suffix):
    path = tmp_path / f"a.jsonl.{suffix}"
    compress(path, b"".join(b'{"text": "%d"}\n' % number for number in range(1000)))
    path.write_bytes(path.read_bytes()[:-20])
    (tmp_path / f"b.jsonl.{suffix}").write_bytes(b"plain text")
    for name in ("a", "b"):
        with pytest.raises(UserError, match=rf"{name}\.jsonl\.{suffix}: the compressed file is damaged or cut off"):
            JsonLines(paths=(str(tmp_path / f"{name}.jsonl.{suffix}"),)).documents()


def test_parquet_rows_in_any_order_over_files_and_row_groups(tmp_path):
    pytest.importorskip("pyarrow")
    write_parquet(tmp_path / "a.parquet", TEXTS, "body", row_group_size=2)
    write_parquet(tmp_path / "b.parquet", ["last"], "body")
    (tmp_path / "notes.txt").write_text("left out: a folder stands for its Parquet files")
    documents = Parquet(paths=(str(tmp_path),), column="body").documents()
    assert list(documents) == [*TEXTS, "last"]
    assert [documents[index] for index in (7, 0, 5, 2)] == ["last", *(TEXTS[index] for index in (0, 5, 2))]
    assert documents.names[3] == f"{tmp_path / 'a.parquet'}:3"
    assert documents.names[7] == f"{tmp_path / 'b.parquet'}:0"


@pytest.mark.parametrize("opener", ["new_stream", "new_file"])
def test_arrow_rows_in_any_order_over_batches(tmp_path, opener):
    pytest.importorskip("pyarrow")
    write_arrow(tmp_path / "a.arrow", TEXTS, opener, rows=3)
    write_arrow(tmp_path / "b.arrow", ["last"], opener)
    documents = ArrowFiles(paths=(str(tmp_path),)).documents()
    assert list(documents) == [*TEXTS, "last"]
    assert [documents[index] for index in (7, 0, 5, 2)] == ["last", *(TEXTS[index] for index in (0, 5, 2))]
    assert documents.names[7] == f"{tmp_path / 'b.arrow'}:0"


def test_saved_datasets_and_their_splits(tmp_path):
    pytest.importorskip("pyarrow")
    write_saved_dataset(tmp_path / "all" / "train", [["a", "b"], ["c"]])
    write_saved_dataset(tmp_path / "all" / "test", [["d"]])
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert list(ArrowFiles(paths=(str(tmp_path / "all"),), split="train").documents()) == ["a", "b", "c"]
    assert list(ArrowFiles(paths=(str(tmp_path / "all" / "test"),)).documents()) == ["d"]
    state = tmp_path / "all" / "test" / "state.json"
    for split, content, message in (
        (None, None, "is a folder of the splits train, test, and split is not set"),
        ("dev", None, "is a folder of the splits train, test, and not 'dev'"),
        ("test", {"_data_files": [{"filename": "gone.arrow"}]}, r"state.json names .*gone.arrow, which does not exist"),
        ("test", {"_data_files": [], "_indices_data_files": [{"filename": "i"}]}, "separate order of its rows"),
    ):
        if content is not None:
            state.write_text(json.dumps(content))
        with pytest.raises(ConfigError, match=message):
            ArrowFiles(paths=(str(tmp_path / "all"),), split=split).documents()


@pytest.mark.parametrize("kind", [Parquet, ArrowFiles])
def test_tables_that_hold_no_text(tmp_path, kind):
    pytest.importorskip("pyarrow")
    suffix, write = {Parquet: ("parquet", write_parquet), ArrowFiles: ("arrow", write_arrow)}[kind]
    path = tmp_path / f"a.{suffix}"
    write(path, ["one", None])
    documents = kind(paths=(str(path),)).documents()
    assert documents[0] == "one"
    with pytest.raises(BadRecord, match=rf"a\.{suffix}:1: column 'text' is null"):
        documents[1]
    with pytest.raises(UserError, match=r"no column 'body' \(columns present: .*'text'\)"):
        kind(paths=(str(path),), column="body").documents()
    write(path, [1, 2])
    with pytest.raises(UserError, match="column 'text' holds int64, not text"):
        kind(paths=(str(path),)).documents()
    write(path, [b"caf\xc3\xa9", b"caf\xe9"])
    documents = kind(paths=(str(path),)).documents()
    assert documents[0] == "café"
    with pytest.raises(BadRecord, match=rf"a\.{suffix}:1: column 'text' is not UTF-8 at byte 3"):
        documents[1]
    path.write_bytes(b"nothing of the kind, but long enough to be looked at")
    with pytest.raises(UserError, match=rf"a\.{suffix}: not a readable"):
        kind(paths=(str(path),)).documents()


def test_array_records_in_any_order_over_files(tmp_path):
    write_array_record(tmp_path / "a.array_record", [text.encode() for text in TEXTS])
    write_array_record(tmp_path / "b.array_record", [b"last", b"\xff"])
    documents = ArrayRecords(paths=(str(tmp_path),)).documents()
    assert [documents[index] for index in (7, 0, 5, 2)] == ["last", *(TEXTS[index] for index in (0, 5, 2))]
    assert documents.names[7] == f"{tmp_path / 'b.array_record'}:0"
    with pytest.raises(BadRecord, match=r"b\.array_record:1: not UTF-8 at byte 0"):
        documents[8]


def test_array_records_of_objects_and_examples(tmp_path):
    example = example_class()()
    entry = example.features.feature.add(key="body")
    entry.value.bytes_list.value.append("größer".encode())
    two = example_class()()
    two.features.feature.add(key="body").value.bytes_list.value.extend([b"a", b"b"])
    path = tmp_path / "a.array_record"
    write_array_record(path, [example.SerializeToString(), b"\xff\xff", two.SerializeToString(), b""])
    documents = ArrayRecords(paths=(str(path),), record="example", field="body").documents()
    assert documents[0] == "größer"
    for index, message in ((1, "not a tf.train.Example"), (2, "feature 'body' holds 2 byte strings"), (3, "no feature 'body'")):
        with pytest.raises(BadRecord, match=rf"a\.array_record:{index}: {message}"):
            documents[index]
    write_array_record(path, [b'{"text": "one"}', b"{"])
    documents = ArrayRecords(paths=(str(path),), record="json").documents()
    assert documents[0] == "one"
    with pytest.raises(BadRecord, match=r"a\.array_record:1: not valid JSON"):
        documents[1]


def test_damaged_array_records(tmp_path):
    path = tmp_path / "a.array_record"
    write_array_record(path, [b"one of two", b"two of two"])
    whole = path.read_bytes()
    path.write_bytes(whole[:-50_000])
    with pytest.raises(UserError, match=r"a\.array_record: not a readable ArrayRecord file"):
        ArrayRecords(paths=(str(path),)).documents()
    place = whole.index(b"ne of two")
    path.write_bytes(whole[:place] + b"1" + whole[place + 1 :])
    documents = ArrayRecords(paths=(str(path),)).documents()
    assert documents[1] == "two of two"
    with pytest.raises(BadRecord, match=r"a\.array_record:0: damaged"):
        documents[0]


def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(UserError, match="reading X files needs the package mlt_absent, which is not installed; run: pip install"):
        require_package("mlt_absent", "reading X files")
