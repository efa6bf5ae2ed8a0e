"""Packing documents into rows by position: concatenate, then cut, with random access.

The targets of all documents, one epoch after another, form an endless line; row r is its piece from r*T up to
(r+1)*T. A document of n ids (its start and end tokens included) has n - 1 targets, so no target is lost where a
row cuts it: the rest continues in the next row as a new segment with positions from 0. Rows depend on nothing
but the documents, the seed and r, so there is no buffer to save.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mlt.data.order import permutation

Row = dict[str, np.ndarray]


@dataclass(frozen=True)
class Pieces:
    """Runs of targets: piece i predicts ids begins[i]+1 .. begins[i]+lengths[i] of the flat token array."""

    begins: np.ndarray
    lengths: np.ndarray


class DocumentLine:
    """Documents end to end, addressed by target position, for one order of the documents.

    starts_D is the index of each document's first id in the flat token array, targets_D its number of
    targets, at least 1.
    """

    def __init__(self, starts_D: np.ndarray, targets_D: np.ndarray):
        self._starts_D = starts_D
        self._edges = np.concatenate([[0], np.cumsum(targets_D, dtype=np.int64)])

    def __len__(self) -> int:
        return int(self._edges[-1])

    def cut(self, begin: int, end: int) -> Pieces:
        """The pieces that cover target positions [begin, end), 0 <= begin < end <= len(self)."""
        first = int(np.searchsorted(self._edges, begin, side="right")) - 1
        last = int(np.searchsorted(self._edges, end, side="left"))
        inside = np.clip(self._edges[first : last + 1], begin, end)
        return Pieces(self._starts_D[first:last] + inside[:-1] - self._edges[first:last], np.diff(inside))


class EndlessRows:
    """Rows of one source for training: full, without padding, without end.

    Each epoch goes through all documents once, in an order drawn from `key` and the epoch. Rows are then
    permuted within blocks of `shuffle_block_rows` rows, so that one batch does not hold consecutive rows of
    one document.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        starts_D: np.ndarray,
        targets_D: np.ndarray,
        *,
        sequence_length: int,
        key: tuple[int | str, ...],
        shuffle_documents: bool = True,
        shuffle_block_rows: int = 1,
    ):
        self._tokens, self._starts_D, self._targets_D = tokens, starts_D, targets_D
        self._epoch_targets = int(targets_D.sum())
        self._sequence_length = sequence_length
        self._key = key
        self._shuffle_documents = shuffle_documents
        self._block_rows = shuffle_block_rows
        # A row touches few epochs and neighbouring rows share a block; threads may share the caches.
        self._line = lru_cache(maxsize=4)(self._make_line)
        self._block = lru_cache(maxsize=4)(self._make_block)

    def __getitem__(self, index: int) -> Row:
        """Row `index` >= 0: tokens, targets, segment_ids, positions int32 (T,) and weights float32 (T,)."""
        block, place = divmod(index, self._block_rows)
        begin = (block * self._block_rows + int(self._block(block)[place])) * self._sequence_length
        end = begin + self._sequence_length
        pieces = []
        while begin < end:
            epoch, offset = divmod(begin, self._epoch_targets)
            count = min(end - begin, self._epoch_targets - offset)
            pieces.append(self._line(epoch).cut(offset, offset + count))
            begin += count
        joined = Pieces(
            np.concatenate([piece.begins for piece in pieces]),
            np.concatenate([piece.lengths for piece in pieces]),
        )
        return fill_row(self._tokens, joined, sequence_length=self._sequence_length)

    def _make_line(self, epoch: int) -> DocumentLine:
        if not self._shuffle_documents:
            return DocumentLine(self._starts_D, self._targets_D)
        order = permutation(len(self._starts_D), *self._key, "documents", epoch)
        return DocumentLine(self._starts_D[order], self._targets_D[order])

    def _make_block(self, block: int) -> np.ndarray:
        if self._block_rows == 1:
            return np.zeros(1, np.int64)
        return permutation(self._block_rows, *self._key, "rows", block)


class OnePassRows:
    """Rows of one source for validation: every target once, in document order, the last row padded."""

    def __init__(
        self,
        tokens: np.ndarray,
        starts_D: np.ndarray,
        targets_D: np.ndarray,
        *,
        sequence_length: int,
        pad_id: int,
    ):
        self._tokens = tokens
        self._line = DocumentLine(starts_D, targets_D)
        self._sequence_length = sequence_length
        self._pad_id = pad_id

    def __len__(self) -> int:
        return -(-len(self._line) // self._sequence_length)

    def __getitem__(self, index: int) -> Row:
        """Row 0 <= `index` < len(self); fields as in EndlessRows, segment 0 and weight 0 at padding."""
        begin = index * self._sequence_length
        pieces = self._line.cut(begin, min(begin + self._sequence_length, len(self._line)))
        return fill_row(self._tokens, pieces, sequence_length=self._sequence_length, pad_id=self._pad_id)


def fill_row(tokens: np.ndarray, pieces: Pieces, *, sequence_length: int, pad_id: int = 0) -> Row:
    """Gathers the pieces from the flat token array into one row of `sequence_length`, padded at the end."""
    ends = np.cumsum(pieces.lengths)
    used = int(ends[-1]) if len(ends) else 0
    positions = np.arange(used) - np.repeat(ends - pieces.lengths, pieces.lengths)
    index = np.repeat(pieces.begins, pieces.lengths) + positions
    row = padding_row(sequence_length, pad_id)
    row["tokens"][:used] = tokens[index]
    row["targets"][:used] = tokens[index + 1]
    row["weights"][:used] = 1.0
    row["segment_ids"][:used] = np.repeat(np.arange(1, len(pieces.lengths) + 1), pieces.lengths)
    row["positions"][:used] = positions
    return row


def padding_row(sequence_length: int, pad_id: int) -> Row:
    """A row of padding alone: segment 0, weight 0."""
    return {
        "tokens": np.full(sequence_length, pad_id, np.int32),
        "targets": np.full(sequence_length, pad_id, np.int32),
        "weights": np.zeros(sequence_length, np.float32),
        "segment_ids": np.zeros(sequence_length, np.int32),
        "positions": np.zeros(sequence_length, np.int32),
    }
