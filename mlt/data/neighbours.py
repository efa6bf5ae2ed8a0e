"""Distributions of the next token that a nearest-neighbour search found, as targets of a run: where they lie, and rows of them.

A folder made by `tools/datastore.py` has one entry for each training target of a corpus, in the corpus's order: source after
source, document after document, token after token. An entry is sparse: the ids of `width` tokens and their probabilities. It
belongs to the token of the document and not to a row, so packing, shuffling, batch size and hosts change nothing about it.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from pydantic import Field

from mlt.config.base import Config
from mlt.config.problems import Problem
from mlt.data.corpus import Corpus, TokenizedSource
from mlt.data.pack import Pieces
from mlt.errors import UserError

IDS = "neighbours/ids"
"""Field of a batch: ids of the tokens that follow a position's neighbours, int32 (B, T, W); -1 where there are fewer."""

PROBABILITIES = "neighbours/probabilities"
"""Field of a batch: their probabilities, float32 (B, T, W), largest first, 0 where there are fewer and at padding."""

NONE = -1
HEADER = "targets.json"
FILES = {"ids": "ids.npy", "probabilities": "probabilities.npy"}
_BLOCK = 65_536


class Neighbours(Config):
    """Targets of a nearest-neighbour search over the documents that a run trains on (`docs/side_memories.md`).

    Attributes:
        folder: made by `python tools/datastore.py search`, which prints the other fields.
        digest: of what is in it; no other targets are taken.
        width: tokens an entry has (W).
    """

    folder: Annotated[str, Field(min_length=1)]
    digest: Annotated[str, Field(min_length=1)]
    width: Annotated[int, Field(ge=1)]

    def file_problems(self) -> Iterable[Problem]:
        try:
            header = read_header(self.folder)
        except UserError as error:
            yield Problem("folder", self.folder, str(error), "make it with tools/datastore.py")
            return
        for name, ours in (("digest", self.digest), ("width", self.width)):
            if header[name] != ours:
                yield Problem(name, ours, f"is {header[name]!r} in {self.folder}", "a run's targets do not change")

    @classmethod
    def of(cls, folder: str) -> Self:
        """The targets in a folder as they are now. Raises UserError: there are none."""
        header = read_header(folder)
        return cls(folder=folder, digest=header["digest"], width=header["width"])

    def opened(self, corpus: Corpus) -> "NeighbourRows":
        """The targets, mapped into memory.

        Raises:
            UserError: they cannot be read, are others than `digest` names, or those of other documents.
        """
        header = read_header(self.folder)
        if (header["digest"], header["width"]) != (self.digest, self.width):
            raise UserError(
                f"{self.folder}: has digest {header['digest']} and width {header['width']}, and data.neighbours says "
                f"{self.digest} and {self.width}. A run's targets do not change: bring them back, or start a new run."
            )
        check_sources(self.folder, header, corpus)
        arrays = {name: _mapped(Path(self.folder) / file) for name, file in FILES.items()}
        for name, array in arrays.items():
            if array.shape != (header["entries"], self.width):
                raise UserError(
                    f"{self.folder}/{FILES[name]}: has the shape {array.shape}, and {HEADER} says "
                    f"{(header['entries'], self.width)}. It is damaged: make the targets again."
                )
        return NeighbourRows(arrays["ids"], arrays["probabilities"], entries(corpus.sources))


@dataclass(frozen=True)
class Entries:
    """Numbers of a source's training targets.

    Attributes:
        offsets_D: as `TokenizedSource` has them.
        firsts_D: entry of each document's first target, int64; -1 for documents that are held out.
        stop: behind the source's last entry.
    """

    offsets_D: np.ndarray
    firsts_D: np.ndarray
    stop: int

    def of(self, begins: np.ndarray) -> np.ndarray:
        """Entries of the targets behind these places of the flat ids; each must lie in a document for training."""
        documents = self.offsets_D.searchsorted(begins, side="right") - 1
        firsts = self.firsts_D[documents]
        if np.any(firsts < 0):
            raise ValueError("documents that are held out have no neighbours")
        return firsts + begins - self.offsets_D[documents]


def entries(sources: Sequence[TokenizedSource]) -> list[Entries]:
    """Those of each source; they are numbered through all of them."""
    found, stop = [], 0
    for source in sources:
        targets_D = np.where(source.held_out_D, 0, np.diff(source.offsets_D) - 1)
        ends_D = stop + np.cumsum(targets_D)
        firsts_D = np.where(source.held_out_D, -1, ends_D - targets_D)
        stop = int(ends_D[-1])
        found.append(Entries(source.offsets_D, firsts_D, stop))
    return found


class NeighbourRows:
    """Writes the fields of rows.

    Args:
        ids_NW, probabilities_NW: the entries; ids may be unsigned, probabilities float32.
        sources: their numbers.
    """

    def __init__(self, ids_NW: np.ndarray, probabilities_NW: np.ndarray, sources: list[Entries]):
        self._ids_NW, self._probabilities_NW, self._sources = ids_NW, probabilities_NW, sources

    def empty(self, rows: int, length: int) -> dict[str, np.ndarray]:
        """The fields of `rows` rows, not filled."""
        shape = (rows, length, self._ids_NW.shape[1])
        return {IDS: np.empty(shape, np.int32), PROBABILITIES: np.empty(shape, np.float32)}

    def write(self, batch: dict[str, np.ndarray], place: int, source: int, pieces: Pieces) -> None:
        """Fills row `place`, which is made of these pieces of a source."""
        firsts, used = self._sources[source].of(pieces.begins), 0
        for first, length in zip(firsts.tolist(), pieces.lengths.tolist(), strict=True):
            batch[IDS][place, used : used + length] = self._ids_NW[first : first + length]
            batch[PROBABILITIES][place, used : used + length] = self._probabilities_NW[first : first + length]
            used += length
        batch[IDS][place, used:], batch[PROBABILITIES][place, used:] = NONE, 0.0


def read_header(folder: str) -> dict[str, Any]:
    """What a folder of targets says of itself.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = Path(os.path.expanduser(folder)) / HEADER
    try:
        header = json.loads(path.read_text())
        return {name: header[name] for name in ("digest", "width", "entries", "sources", "tokenizer")} | header
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is no header of targets ({error})") from error


def check_sources(where: str, header: dict[str, Any], corpus: Corpus) -> None:
    """Raises UserError: what a header describes was made of other documents, or with another tokenizer or split."""
    found = [source.hash for source in corpus.sources]
    if header["sources"] != found:
        raise UserError(
            f"{where}: was made of the documents with the hashes {', '.join(header['sources'])}, and these have "
            f"{', '.join(found)}. Documents, their order, tokenizer and validation_fraction must be the same: make it again."
        )


def digest_of(facts: dict[str, Any], arrays: Sequence[np.ndarray]) -> str:
    """16 hex digits that stand for facts and arrays, read in blocks."""
    hasher = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8)
    for array in arrays:
        for first in range(0, len(array), _BLOCK):
            hasher.update(np.ascontiguousarray(array[first : first + _BLOCK]).tobytes())
    return hasher.hexdigest()


def _mapped(path: Path) -> np.ndarray:
    try:
        return np.load(path.expanduser(), mmap_mode="r")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}. Make it with tools/datastore.py.") from error
    except ValueError as error:
        raise UserError(f"{path}: is no array ({error}). Make it with tools/datastore.py.") from error
