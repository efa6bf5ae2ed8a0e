"""Tokenizers: lossless round trips, exact byte counts, boundaries no text can forge, clear errors."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlt.data.huggingface import HuggingFaceTokenizer
from mlt.data.stdlib_source import PythonStdlib
from mlt.data.tokenize import ByteTokenizer
from mlt.errors import UserError

TEXT = "def f(x):\n\treturn 'größer 日本 🎉'\r\n  # <|eos|> <s>\x00"


@pytest.fixture(scope="module")
def bpe_path(tmp_path_factory):
    """A byte-level BPE as they are trained in the wild, start and end tokens first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(PythonStdlib(max_bytes=60_000).documents(), trainer)
    tokenizer.add_tokens(["<tag>", "ééé"])  # added text is itself, not a spelling of bytes
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def bpe(bpe_path):
    return HuggingFaceTokenizer(path=bpe_path, bos_token="<s>", eos_token="</s>")


def test_byte_ids_and_padding():
    tokenizer = ByteTokenizer()
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (
        256,
        257,
        258,
        272,
    )
    assert ByteTokenizer(vocab_multiple=1).vocab_size == 259
    assert tokenizer.encode("é").tolist() == [0xC3, 0xA9]
    assert tokenizer.decode([256, 0xC3, 0xA9, 257, 258, 271, 0xC3]) == "é\ufffd"


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_byte_round_trip_and_byte_count(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


@settings(max_examples=60, deadline=None)
@given(text=st.text())
def test_bpe_round_trip_and_byte_count(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.token_bytes()[ids].sum() == len(text.encode())


def test_bpe_layout(bpe):
    assert bpe.vocab_size == 640  # 602 rounded up to a multiple of 128
    assert (bpe.bos_id, bpe.eos_id, bpe.pad_id) == (0, 1, 1)
    counts = bpe.token_bytes()
    assert counts.shape == (640,)
    assert counts[[0, 1]].tolist() == [0, 0]
    assert counts[600:].tolist() == [5, 6] + [0] * 38
    added = bpe.encode("aéééb<tag>")
    assert {600, 601} <= set(added.tolist())
    assert counts[added].sum() == 13
    assert counts.max() > 1
    ids = bpe.encode(TEXT)
    assert len(ids) < len(TEXT.encode())
    assert bpe.decode([0, *ids, 1, 639]) == TEXT


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_no_text_encodes_to_a_boundary(name, bpe):
    tokenizer = bpe if name == "bpe" else ByteTokenizer()
    special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
    text = "".join(tokenizer.token_entries()[index] for index in special)
    ids = tokenizer.encode(text)
    assert not special & set(ids.tolist())
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_token_entries_and_strings(name, bpe):
    tokenizer = bpe if name == "bpe" else ByteTokenizer()
    entries, texts = tokenizer.token_entries(), tokenizer.token_strings()
    assert len(set(entries)) == len(entries) == len(texts) == tokenizer.vocab_size
    counts = tokenizer.token_bytes()
    for index, text in enumerate(texts):
        if counts[index] and "\ufffd" not in text:
            assert len(text.encode()) == counts[index]
            assert tokenizer.decode([index]) == text
        if not counts[index]:
            assert text == entries[index]
    assert sum("\ufffd" in text for text in texts) >= 128  # the bytes above 0x7f are parts of characters


def test_saved_byte_tokenizer_is_a_hugging_face_tokenizer(tmp_path):
    ours = ByteTokenizer()
    ours.save(tmp_path)
    loaded = HuggingFaceTokenizer(path=str(tmp_path / "tokenizer.json"), vocab_multiple=16)
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id, loaded.vocab_size) == (256, 257, 258, 272)
    np.testing.assert_array_equal(loaded.encode(TEXT), ours.encode(TEXT))
    np.testing.assert_array_equal(loaded.token_bytes(), ours.token_bytes())
    assert loaded.token_entries() == ours.token_entries()
    assert loaded.token_strings() == ours.token_strings()
    assert loaded.decode(ours.encode(TEXT)) == TEXT


def test_saved_byte_tokenizer_starts_a_text_as_training_does(tmp_path):
    from tokenizers import Tokenizer

    ByteTokenizer().save(tmp_path)
    loaded = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert loaded.encode("ab").ids == [256, 97, 98]
    assert loaded.encode("<|eos|>", add_special_tokens=False).ids == [257]


def test_save_then_load_keeps_a_bpe(bpe, tmp_path):
    bpe.save(tmp_path / "new" / "folder")
    loaded = HuggingFaceTokenizer(path=str(tmp_path / "new" / "folder" / "tokenizer.json"))
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (bpe.bos_id, bpe.eos_id, bpe.pad_id)
    np.testing.assert_array_equal(loaded.encode(TEXT), bpe.encode(TEXT))
    assert loaded.digest == bpe.digest


def test_byte_counts_of_a_sentencepiece_style_vocabulary(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    entries = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "\u2581a", "b"]
    model = models.Unigram([(entry, -1.0) for entry in entries], unk_id=0, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    ours = HuggingFaceTokenizer(path=str(path), eos_token="</s>")
    text = "b ab é日 a"
    ids = ours.encode(text)
    assert ours.token_bytes()[ids].sum() == len(text.encode())
    assert ours.bos_id == ours.eos_id == 1


def test_digest_follows_content_and_special_tokens(bpe, bpe_path):
    assert bpe.digest == HuggingFaceTokenizer(path=bpe_path, bos_token="<s>", eos_token="</s>").digest
    assert bpe.digest != HuggingFaceTokenizer(path=bpe_path, eos_token="</s>").digest
    assert ByteTokenizer().digest != ByteTokenizer(vocab_multiple=128).digest


def test_tokenizer_file_missing_invalid_or_without_end_token(tmp_path, bpe_path):
    def problem(path, **settings):
        tokenizer = HuggingFaceTokenizer(path=str(path), **settings)
        (found,) = tokenizer.file_problems()
        message = str(found.under("data.tokenizer"))
        assert message.startswith(f"data.tokenizer: {path}: ")
        with pytest.raises(UserError):
            _ = tokenizer.bos_id
        return message

    assert "No such file" in problem(tmp_path / "gone.json")
    assert "directory" in problem(tmp_path)
    (tmp_path / "pointer.json").write_text("version https://git-lfs\n")
    assert "not a valid tokenizer.json" in problem(tmp_path / "pointer.json")
    (tmp_path / "other.json").write_text('{"model": {"type": "Unheard"}}')
    assert "not a valid tokenizer.json" in problem(tmp_path / "other.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    assert "not a valid tokenizer.json" in problem(tmp_path / "bytes.json")
    message = problem(bpe_path)
    assert "eos_token is not set" in message
    assert "special tokens present: </s>, <s>" in message
    assert "'<end>', which is not in the vocabulary" in problem(bpe_path, eos_token="<end>")


def test_special_tokens_from_the_settings_beside(tmp_path, bpe_path):
    path = tmp_path / "tokenizer.json"
    shutil.copy(bpe_path, path)
    beside = tmp_path / "tokenizer_config.json"
    beside.write_text(json.dumps({"eos_token": {"content": "</s>"}, "bos_token": None}))
    tokenizer = HuggingFaceTokenizer(path=str(path))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 1)
    assert HuggingFaceTokenizer(path=str(path), eos_token="<s>").eos_id == 0
    beside.write_text("{")
    path.touch()  # the settings are read with the file
    assert "tokenizer_config.json: not valid JSON" in str(*tokenizer.file_problems())
