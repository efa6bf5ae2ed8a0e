"""Tokenizers in the `tokenizer.json` format, read with the `tokenizers` library."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from mlt.config.problems import ABSENT, Problem
from mlt.data.sources import read_bytes
from mlt.data.tokenize import Tokenizer, byte_characters, padded_size, padding_entries
from mlt.errors import UserError


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json from disk.

    The special tokens are looked up by name; a name that is None is taken from the `tokenizer_config.json`
    beside the file. A tokenizer without a start token starts documents with its end token, one without
    padding pads with it.

    Attributes:
        path: the tokenizer.json file.
        bos_token, eos_token, pad_token: vocabulary entries that start a document, end it, and pad.
        vocab_multiple: vocab_size is rounded up to a multiple of this.
    """

    path: str
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    vocab_multiple: Annotated[int, Field(ge=1)] = 128

    @property
    def vocab_size(self) -> int:
        return padded_size(self._loaded.size, self.vocab_multiple)

    @property
    def bos_id(self) -> int:
        bos_id = self._special_id("bos_token")
        return self.eos_id if bos_id is None else bos_id

    @property
    def eos_id(self) -> int:
        eos_id = self._special_id("eos_token")
        if eos_id is None:
            special = ", ".join(sorted(self._loaded.special)) or "none"
            raise UserError(
                f"{self.path}: which token ends a document is not known: eos_token is not set and no "
                f"tokenizer_config.json beside the file names one. Set eos_token (special tokens present: "
                f"{special})."
            )
        return eos_id

    @property
    def pad_id(self) -> int:
        pad_id = self._special_id("pad_token")
        return self.eos_id if pad_id is None else pad_id

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._loaded.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        known = [int(index) for index in ids if 0 <= index < self._loaded.size]
        return self._loaded.tokenizer.decode(known, skip_special_tokens=True)

    def token_bytes(self) -> np.ndarray:
        """Bytes of text each id stands for, int64 (vocab_size,).

        Exact for byte-level vocabularies (each character of an entry is one byte) and for `<0xNN>` entries.
        Elsewhere it is the UTF-8 length of the entry with the word-start mark as a space and `##` left out,
        which is right up to what the tokenizer's own normalization adds or removes.
        """
        loaded = self._loaded
        special = {*loaded.special.values(), self.bos_id, self.eos_id, self.pad_id}
        lengths = np.zeros(self.vocab_size, np.int64)
        for index, entry in enumerate(loaded.entries):
            if index not in special and entry is not None:
                lengths[index] = _text_bytes(entry, loaded.byte_level and index not in loaded.added)
        return lengths

    def token_entries(self) -> tuple[str, ...]:
        entries = padding_entries(0, self.vocab_size)
        for index, entry in enumerate(self._loaded.entries):
            entries[index] = entries[index] if entry is None else entry
        return tuple(entries)

    def token_strings(self) -> tuple[str, ...]:
        strings = list(self.token_entries())
        present = [index for index, entry in enumerate(self._loaded.entries) if entry is not None]
        alone = self._loaded.tokenizer.decode_batch([[index] for index in present], skip_special_tokens=False)
        for index, text in zip(present, alone, strict=True):
            strings[index] = text
        return tuple(strings)

    def tokenizer_json(self) -> str:
        """The file as it is."""
        return Path(os.path.expanduser(self.path)).read_text(encoding="utf-8")

    @property
    def digest(self) -> str:
        return f"{self._loaded.digest}-{self.bos_id}-{self.eos_id}-{self.pad_id}-{self.vocab_size}"

    def file_problems(self) -> Iterable[Problem]:
        try:
            _ = self.digest
        except UserError as error:
            yield Problem("", ABSENT, str(error))

    @property
    def _loaded(self) -> "_Loaded":
        path = os.path.expanduser(self.path)
        try:
            status = os.stat(path)
        except OSError as error:
            raise UserError(
                f"{self.path}: the tokenizer cannot be read: {error.strerror}. Give the path of a "
                "tokenizer.json, or use ByteTokenizer(), which needs no file."
            ) from error
        return _load(path, status.st_mtime_ns, status.st_size)

    def _special_id(self, setting: str) -> int | None:
        name = getattr(self, setting)
        origin = setting
        if name is None:
            name = self._loaded.beside.get(setting)
            name = name.get("content") if isinstance(name, dict) else name
            origin = f"{setting} of the tokenizer_config.json beside it"
        if name is None:
            return None
        index = self._loaded.tokenizer.token_to_id(name)
        if index is None:
            special = ", ".join(sorted(self._loaded.special)) or "none"
            raise UserError(
                f"{self.path}: {origin} is {name!r}, which is not in the vocabulary. Set {setting} to an "
                f"entry of the vocabulary (special tokens present: {special})."
            )
        return index


@dataclass(frozen=True)
class _Loaded:
    """What is read once from a tokenizer.json."""

    tokenizer: Any
    entries: list[str | None]
    special: dict[str, int]
    added: set[int]
    byte_level: bool
    beside: dict[str, Any]
    digest: str

    @property
    def size(self) -> int:
        return len(self.entries)


@lru_cache(maxsize=4)
def _load(path: str, modified_ns: int, size_bytes: int) -> _Loaded:
    """Reads and checks the file; the time and size are there to notice that it changed."""
    from tokenizers import Tokenizer as Fast

    del modified_ns, size_bytes
    data = read_bytes(path)
    try:
        text = data.decode("utf-8")
        description = json.loads(text)
        fast = Fast.from_str(text)
    except Exception as error:  # the library raises bare Exception for every kind of bad file
        raise UserError(
            f"{path}: not a valid tokenizer.json: {error}. It must be a file written by the `tokenizers` "
            "library (`tokenizer.save(path)`), complete and not a download page or a pointer to a large file."
        ) from error
    fast.encode_special_tokens = True  # a document that spells a special token out must not get one
    fast.no_truncation()
    fast.no_padding()
    vocabulary = fast.get_vocab(with_added_tokens=True)
    entries: list[str | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    for entry, index in vocabulary.items():
        entries[index] = entry
    added = description.get("added_tokens") or []
    return _Loaded(
        tokenizer=fast,
        entries=entries,
        special={token["content"]: token["id"] for token in added if token.get("special")},
        added={token["id"] for token in added},
        byte_level=_is_byte_level(description.get("decoder")),
        beside=_read_beside(Path(path).with_name("tokenizer_config.json")),
        digest=hashlib.blake2b(data, digest_size=8).hexdigest(),
    )


def _is_byte_level(decoder: dict[str, Any] | None) -> bool:
    parts = (decoder or {}).get("decoders", [decoder or {}])
    return any(part.get("type") == "ByteLevel" for part in parts)


def _read_beside(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}. Repair it, or remove it and set eos_token.") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path}: must hold a JSON object. Repair it, or remove it and set eos_token.")
    return settings


_BYTE_CHARACTERS = frozenset(byte_characters())


def _text_bytes(entry: str, byte_level: bool) -> int:
    if byte_level and _BYTE_CHARACTERS.issuperset(entry):
        return len(entry)
    if len(entry) == 6 and entry.startswith("<0x") and entry.endswith(">"):
        return 1
    return len(entry.removeprefix("##").replace("\u2581", " ").encode("utf-8"))
