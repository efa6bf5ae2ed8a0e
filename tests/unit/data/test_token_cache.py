"""The cache of tokenised documents: the same ids, verified, bounded, shared, and never in the way of a run."""

import gc
import logging
import os
import threading
import time

import numpy as np
import pytest

from mlt.data.config import DataConfig
from mlt.data.load_corpus import load_corpus
from mlt.data.mixture import Mixture
from mlt.data.synthetic import SyntheticText
from mlt.data.token_cache import TokenCache
from mlt.data.tokenize import ByteTokenizer

TOKENS, OFFSETS = np.arange(500, dtype=np.uint16), np.array([0, 100, 500])


def never():
    raise AssertionError("made again although it is stored")


def config(folder, **settings):
    chosen = {"source": Mixture.example(), "sequence_length": 16, "batch_size": 2, **settings}
    return DataConfig(cache=TokenCache(folder=str(folder)), **chosen)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_corpus_from_the_cache_is_the_corpus(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    plain = load_corpus(config(folder).replace(cache=None))
    stored = load_corpus(config(folder))
    monkeypatch.setattr(ByteTokenizer, "encode_batch", lambda *_: never())
    cached = load_corpus(config(folder))
    for corpus in (stored, cached):
        assert corpus.hash == plain.hash
        for ours, other in zip(corpus.sources, plain.sources, strict=True):
            np.testing.assert_array_equal(ours.tokens, other.tokens)
            np.testing.assert_array_equal(ours.offsets_D, other.offsets_D)
            assert ours.tokens.dtype == other.tokens.dtype
    assert [path.suffix for path in folder.iterdir()] == [".ids", ".ids"]  # one a source, nothing half-written


def test_the_key_is_text_and_tokenizer(tmp_path):
    for seed, multiple in ((1, 16), (2, 16), (1, 128)):
        source = SyntheticText(num_documents=30, seed=seed)
        load_corpus(config(tmp_path, source=source, tokenizer=ByteTokenizer(vocab_multiple=multiple)))
    assert len(names(tmp_path)) == 3


@pytest.mark.parametrize("damage", ["cut", "empty", "header", "offsets", "ids", "longer"])
def test_a_damaged_file_is_reported_and_made_again(tmp_path, caplog, damage):
    cache = TokenCache(folder=str(tmp_path))
    cache.tokens("k", lambda: (TOKENS, OFFSETS))
    path = tmp_path / "tokens-k.ids"
    whole = path.read_bytes()
    flip = {"header": 3, "offsets": 260, "ids": len(whole) - 1}.get(damage)
    spoiled = {"cut": whole[:-2], "empty": b"", "longer": whole + b"\0\0"}.get(damage) or (
        b"" if flip is None else whole[:flip] + bytes([whole[flip] ^ 1]) + whole[flip + 1 :]
    )
    path.write_bytes(spoiled)
    with caplog.at_level(logging.WARNING, logger="mlt.data"):
        tokens, _ = cache.tokens("k", lambda: (TOKENS, OFFSETS))
    assert "tokens-k.ids: this token cache file is damaged" in caplog.text
    np.testing.assert_array_equal(tokens, TOKENS)
    assert path.read_bytes() == whole
    tokens, offsets = cache.tokens("k", never)
    np.testing.assert_array_equal(tokens, TOKENS)
    np.testing.assert_array_equal(offsets, OFFSETS)


def test_it_is_bounded_and_the_longest_unused_goes_first(tmp_path):
    cache = TokenCache(folder=str(tmp_path), max_bytes=3000)  # room for two
    for age, key in ((300, "a"), (200, "b")):
        cache.tokens(key, lambda: (TOKENS, OFFSETS))
        os.utime(tmp_path / f"tokens-{key}.ids", (time.time() - age,) * 2)
    cache.tokens("a", never)  # used again
    gc.collect()
    cache.tokens("c", lambda: (TOKENS, OFFSETS))
    assert names(tmp_path) == ["tokens-a.ids", "tokens-c.ids"]


def test_what_is_in_use_stays(tmp_path):
    cache = TokenCache(folder=str(tmp_path), max_bytes=3000)
    for key in ("a", "b"):
        cache.tokens(key, lambda: (TOKENS, OFFSETS))
    held = cache.tokens("a", never)
    os.utime(tmp_path / "tokens-a.ids", (0, 0))
    cache.tokens("c", lambda: (TOKENS, OFFSETS))
    assert names(tmp_path) == ["tokens-a.ids", "tokens-c.ids"]
    np.testing.assert_array_equal(held[0], TOKENS)
    del held
    gc.collect()
    os.utime(tmp_path / "tokens-a.ids", (0, 0))
    cache.tokens("d", lambda: (TOKENS, OFFSETS))
    assert names(tmp_path) == ["tokens-c.ids", "tokens-d.ids"]


def test_what_does_not_fit_is_not_stored(tmp_path, caplog):
    tokens, _ = TokenCache(folder=str(tmp_path), max_bytes=500).tokens("k", lambda: (TOKENS, OFFSETS))
    np.testing.assert_array_equal(tokens, TOKENS)
    assert names(tmp_path) == []
    assert "more than the token cache's max_bytes=500" in caplog.text


def test_half_written_files_of_the_dead_are_removed_and_of_the_living_are_not(tmp_path):
    (tmp_path / ".tokens-old.tmp").write_bytes(b"x")
    (tmp_path / ".tokens-new.tmp").write_bytes(b"x")
    os.utime(tmp_path / ".tokens-old.tmp", (0, 0))
    TokenCache(folder=str(tmp_path)).tokens("k", lambda: (TOKENS, OFFSETS))
    assert names(tmp_path) == [".tokens-new.tmp", "tokens-k.ids"]


def test_a_cache_that_cannot_be_written_is_reported_and_done_without(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    corpus = load_corpus(config(tmp_path / "file" / "below"))
    assert corpus.hash == load_corpus(config(tmp_path).replace(cache=None)).hash
    assert "token cache cannot be" in caplog.text


def test_many_hosts_at_once_get_whole_files(tmp_path):
    """More writers and readers than room: every one gets the right ids, and what is left is whole."""
    wrong = []

    def host(number):
        for turn in range(8):
            key = f"k{(number + turn) % 3}"
            tokens, _ = TokenCache(folder=str(tmp_path), max_bytes=3000).tokens(key, lambda: (TOKENS, OFFSETS))
            if not np.array_equal(tokens, TOKENS):
                wrong.append(key)

    hosts = [threading.Thread(target=host, args=(number,)) for number in range(6)]
    for thread in hosts:
        thread.start()
    for thread in hosts:
        thread.join()
    assert wrong == []
    left = names(tmp_path)
    assert left
    assert all(name.startswith("tokens-") for name in left)
    for name in left:
        TokenCache(folder=str(tmp_path)).tokens(name.removeprefix("tokens-").removesuffix(".ids"), never)
