"""Reading a corpus: documents whole and once, a split that stays, hashes that notice, bad records that are counted."""

import itertools
import json
import logging

import numpy as np
import pytest

from mlt.config.problems import ConfigError
from mlt.data.config import DataConfig
from mlt.data.huggingface import HuggingFaceTokenizer
from mlt.data.json_lines import JsonLines
from mlt.data.load_corpus import load_corpus
from mlt.data.mixture import Mixture, Weighted
from mlt.data.synthetic import SyntheticText
from mlt.data.text_files import TextFiles
from mlt.data.tokenize import ByteTokenizer
from mlt.errors import UserError


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def config(source, **settings):
    return DataConfig(source=source, **{"sequence_length": 16, "batch_size": 2, **settings})


def texts_of(corpus, split):
    """The documents of a split, decoded from their ids."""
    (source,) = corpus.sources
    starts, targets = source.split(split)
    found = []
    for start, count in zip(starts, targets, strict=True):
        ids = source.tokens[start : start + count + 1]
        assert ids[0] == corpus.tokenizer.bos_id
        assert ids[-1] == corpus.tokenizer.eos_id
        found.append(corpus.tokenizer.decode(ids[1:-1]))
    return found


TEXTS = [f"document {index} " + "é" * (index % 7) for index in range(300)]


def test_every_document_is_in_one_split_in_order(tmp_path):
    corpus = load_corpus(config(JsonLines(paths=(write_lines(tmp_path / "a.jsonl", TEXTS),)), validation_fraction=0.2))
    train, validation = texts_of(corpus, "train"), texts_of(corpus, "validation")
    assert sorted(train + validation) == sorted(TEXTS)
    assert train == [text for text in TEXTS if text in set(train)]
    assert validation == [text for text in TEXTS if text in set(validation)]
    assert 40 <= len(validation) <= 80
    assert corpus.bytes_read == sum(len(text.encode()) for text in TEXTS)
    assert corpus.sources[0].tokens.dtype == np.uint16


def test_split_stays_when_documents_are_added(tmp_path):
    few = load_corpus(config(JsonLines(paths=(write_lines(tmp_path / "few.jsonl", TEXTS[:200]),))))
    more = load_corpus(config(JsonLines(paths=(write_lines(tmp_path / "more.jsonl", TEXTS[::-1]),))))
    for split in ("train", "validation"):
        assert set(texts_of(few, split)) <= set(texts_of(more, split))


def test_a_larger_fraction_only_moves_documents_to_validation(tmp_path):
    source = JsonLines(paths=(write_lines(tmp_path / "a.jsonl", TEXTS),))
    held_out = [
        set(texts_of(load_corpus(config(source, validation_fraction=fraction)), "validation")) for fraction in (0, 0.1, 0.5, 0.9)
    ]
    assert held_out[0] == set()
    assert all(small < large for small, large in itertools.pairwise(held_out))


def test_hash_notices_text_order_tokenizer_and_split(tmp_path):
    source = JsonLines(paths=(write_lines(tmp_path / "a.jsonl", TEXTS),))
    base = load_corpus(config(source)).hash
    write_lines(tmp_path / "copy.jsonl", TEXTS)
    write_lines(tmp_path / "reversed.jsonl", TEXTS[::-1])
    write_lines(tmp_path / "changed.jsonl", [*TEXTS[:-1], "x"])
    assert load_corpus(config(JsonLines(paths=(str(tmp_path / "copy.jsonl"),)))).hash == base
    assert load_corpus(config(source, sequence_length=32, seed=5)).hash == base
    different = [
        load_corpus(config(JsonLines(paths=(str(tmp_path / "reversed.jsonl"),)))).hash,
        load_corpus(config(JsonLines(paths=(str(tmp_path / "changed.jsonl"),)))).hash,
        load_corpus(config(source, validation_fraction=0.06)).hash,
        load_corpus(config(source, tokenizer=ByteTokenizer(vocab_multiple=128))).hash,
    ]
    assert len({base, *different}) == 5


def test_description_says_what_was_read(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ["", *TEXTS])  # an empty document is left out
    corpus = load_corpus(config(JsonLines(paths=(path,))))
    text = corpus.describe()
    assert f"read {corpus.bytes_read:,} bytes of 300 documents from JSON lines {path}" in text
    assert corpus.hash in text
    mixed = load_corpus(config(Mixture.example())).describe()
    assert mixed.count("from a synthetic source") == 2


def test_summary_counts_long_documents(tmp_path):
    texts = ["a" * 9, "b" * 19, "c" * 20, "d" * 49]  # each has one target more than bytes
    path = write_lines(tmp_path / "a.jsonl", texts)
    corpus = load_corpus(config(JsonLines(paths=(path,)), validation_fraction=0))
    assert corpus.summary(20) == {
        "documents": 4,
        "tokens": 101,
        "median_document_tokens": 20,
        "longest_document_tokens": 50,
        "long_share": 91 / 101,
        "cut_share": 0.5,
    }


def test_nothing_to_read(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match=r"nothing to read in text files .*: 1 documents, none with any text"):
        load_corpus(config(TextFiles(paths=(str(tmp_path),))))
    (tmp_path / "a.jsonl").write_text("\n \n")
    with pytest.raises(UserError, match=r"nothing to read in JSON lines .*: 0 documents"):
        load_corpus(config(JsonLines(paths=(str(tmp_path / "a.jsonl"),))))


def test_an_empty_side_of_the_split(tmp_path):
    source = TextFiles(paths=(str(tmp_path),))
    (tmp_path / "a.txt").write_text("alone")
    with pytest.raises(UserError, match=r"left for validation: validation_fraction=0\.0001 of 1 documents"):
        load_corpus(config(source, validation_fraction=0.0001))
    with pytest.raises(UserError, match="left for training: all 1 of text files"):
        load_corpus(config(source, validation_fraction=0.9999))
    assert texts_of(load_corpus(config(source, validation_fraction=0)), "train") == ["alone"]


def test_missing_files_of_all_parts_at_once():
    parts = (
        Weighted(source=TextFiles(paths=("gone.txt",))),
        Weighted(source=SyntheticText.example()),
        Weighted(source=JsonLines(paths=("gone.jsonl",))),
    )
    bad = config(Mixture(parts=parts), tokenizer=HuggingFaceTokenizer(path="gone.json"))
    with pytest.raises(ConfigError) as error:
        bad.check_files()
    assert [problem.path for problem in error.value.problems] == [
        "data.source.parts[0].source.paths[0]",
        "data.source.parts[2].source.paths[0]",
        "data.tokenizer",
    ]
    DataConfig.example().check_files()


def test_large_vocabularies_take_four_bytes():
    corpus = load_corpus(config(SyntheticText.example(), tokenizer=ByteTokenizer(vocab_multiple=70_000)))
    assert corpus.sources[0].tokens.dtype == np.uint32


def test_names_are_file_and_position_of_what_was_kept(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ["", "one", "", "two"])
    (source,) = load_corpus(config(JsonLines(paths=(path,)), validation_fraction=0)).sources
    assert list(source.names) == [f"{path}:2", f"{path}:4"]


BAD = [b'{"text": 5}', b"{", b"\xff\xfe", b'{"other": "x"}']


def spoiled(tmp_path):
    """300 good lines with a bad one before, between and behind."""
    good = [json.dumps({"text": text}).encode() for text in TEXTS]
    lines = [BAD[0], *good[:100], BAD[1], BAD[2], *good[100:], BAD[3]]
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return JsonLines(paths=(str(tmp_path / "bad.jsonl"),))


def test_bad_records_are_left_out_counted_and_logged_with_their_place(tmp_path, caplog):
    clean = load_corpus(config(JsonLines(paths=(write_lines(tmp_path / "good.jsonl", TEXTS),))))
    with caplog.at_level(logging.WARNING, logger="mlt.data"):
        corpus = load_corpus(config(spoiled(tmp_path), max_bad_records=4))
    assert corpus.bad_records == 4
    assert corpus.hash == clean.hash
    np.testing.assert_array_equal(corpus.sources[0].tokens, clean.sources[0].tokens)
    assert "left out 4 bad records" in corpus.describe()
    for record, (line, reason) in zip(
        caplog.messages, [(1, "not a string"), (102, "not valid JSON"), (103, "not UTF-8"), (304, "no field 'text'")], strict=True
    ):
        assert f"bad.jsonl, line {line}" in record
        assert reason in record


def test_more_bad_records_than_allowed_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"bad\.jsonl, line 1: field 'text' holds 5, not a string"):
        load_corpus(config(spoiled(tmp_path)))
    with pytest.raises(UserError, match=r"(?s)more than data\.max_bad_records=3 .*line 1.*line 102.*line 103.*raise"):
        load_corpus(config(spoiled(tmp_path), max_bad_records=3))


def test_the_limit_is_over_all_sources_and_no_excuse_for_a_file_that_is_gone(tmp_path):
    source = spoiled(tmp_path)
    mixture = Mixture(parts=(Weighted(source=source), Weighted(source=source)))
    assert load_corpus(config(mixture, max_bad_records=8)).bad_records == 8
    with pytest.raises(UserError, match="max_bad_records=7"):
        load_corpus(config(mixture, max_bad_records=7))
    with pytest.raises(UserError, match="does not exist"):
        load_corpus(config(TextFiles(paths=(str(tmp_path / "gone.txt"),)), max_bad_records=100))
