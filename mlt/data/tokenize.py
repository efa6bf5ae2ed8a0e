"""What a tokenizer is, and the default one: bytes."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from mlt.config.base import Config
from mlt.config.problems import Problem
from mlt.errors import UserError

BYTE_SPECIALS = ("<|bos|>", "<|eos|>", "<|pad|>")  # ids 256, 257, 258


class Tokenizer(Config, ABC):
    """Text to ids and back. A subclass is a config and, having no state of its own, the tokenizer too.

    A document becomes [bos_id] + encode(text) + [eos_id]. Special tokens written out in a text are ordinary
    text: no document can forge a boundary.
    """

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, padded so that it divides over devices; no text encodes to the padding ids."""

    @property
    @abstractmethod
    def bos_id(self) -> int:
        """The id a document starts with."""

    @property
    @abstractmethod
    def eos_id(self) -> int:
        """The id a document ends with."""

    @property
    @abstractmethod
    def pad_id(self) -> int:
        """The id of padding."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, int32, without special tokens."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; special and padding ids are left out, broken UTF-8 becomes U+FFFD."""

    @abstractmethod
    def token_bytes(self) -> np.ndarray:
        """Bytes of text each id stands for, int64 (vocab_size,); 0 for special and padding ids.

        Bits per byte is the sum of the losses over the sum of these, divided by ln 2.
        """

    @abstractmethod
    def token_entries(self) -> tuple[str, ...]:
        """The vocabulary's own spelling of each id, (vocab_size,), all different."""

    @abstractmethod
    def token_strings(self) -> tuple[str, ...]:
        """The text each id decodes to by itself, (vocab_size,), U+FFFD where it is a part of a character.

        Special and padding ids show their entry. Engram compresses the vocabulary by these.
        """

    @abstractmethod
    def tokenizer_json(self) -> str:
        """The text of a `tokenizer.json` that encodes alike."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """A short hash that changes when any text could encode differently."""

    @abstractmethod
    def file_problems(self) -> Iterable[Problem]:
        """What is wrong with the files this tokenizer names, with paths relative to it."""

    def encode(self, text: str) -> np.ndarray:
        """The ids of one text, int32, without special tokens."""
        return self.encode_batch([text])[0]

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which serving tools load without this package."""
        directory = Path(directory)
        entries = self.token_entries()
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": entries[self.bos_id],
            "eos_token": entries[self.eos_id],
            "pad_token": entries[self.pad_id],
            "clean_up_tokenization_spaces": False,
        }
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "tokenizer.json").write_text(self.tokenizer_json(), encoding="utf-8")
            (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{error.filename}: the tokenizer cannot be written: {error.strerror}.") from error


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8 are the ids 0 to 255; 256 starts a document, 257 ends it, 258 pads.

    Attributes:
        vocab_multiple: vocab_size is rounded up to a multiple of this (259 -> 272).
    """

    vocab_multiple: Annotated[int, Field(ge=1)] = 16

    @property
    def vocab_size(self) -> int:
        return padded_size(256 + len(BYTE_SPECIALS), self.vocab_multiple)

    @property
    def bos_id(self) -> int:
        return 256

    @property
    def eos_id(self) -> int:
        return 257

    @property
    def pad_id(self) -> int:
        return 258

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = np.asarray(ids, np.int64)
        return ids[(ids >= 0) & (ids < 256)].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        return (np.arange(self.vocab_size) < 256).astype(np.int64)

    def token_entries(self) -> tuple[str, ...]:
        return (*byte_characters(), *BYTE_SPECIALS, *padding_entries(256 + len(BYTE_SPECIALS), self.vocab_size))

    def token_strings(self) -> tuple[str, ...]:
        alone = (bytes([byte]).decode("utf-8", errors="replace") for byte in range(256))
        return (*alone, *self.token_entries()[256:])

    def tokenizer_json(self) -> str:
        """A byte-level BPE without merges. With special tokens, a text starts with <|bos|>, as in training."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

        vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in BYTE_SPECIALS])
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BYTE_SPECIALS[0]} $A", special_tokens=[(BYTE_SPECIALS[0], self.bos_id)]
        )
        return tokenizer.to_str(pretty=True)

    @property
    def digest(self) -> str:
        return f"bytes-{self.vocab_size}"

    def file_problems(self) -> Iterable[Problem]:
        return ()


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's), (256,)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(substitutes)) for byte in range(256)]


def padded_size(size: int, multiple: int) -> int:
    """`size` rounded up to a multiple of `multiple`."""
    return -(-size // multiple) * multiple


def padding_entries(first: int, stop: int) -> list[str]:
    """Entries for the ids that only pad the vocabulary."""
    return [f"<|unused_{index}|>" for index in range(first, stop)]
