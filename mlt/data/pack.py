"""Packing documents into rows by position: concatenate, then cut, with random access.

The targets of all documents, one epoch after another, form an endless line; row r is its piece from r*T up to
(r+1)*T. A document of n ids (its start and end tokens included) has n - 1 targets, so no target is lost where a
row cuts it: the rest continues in the next row as a new segment with positions from 0. Rows depend on nothing
but the documents, the seed and r, so there is no buffer to save.
"""

from abc import ABC, abstractmethod
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
        first = int(self._edges.searchsorted(begin, side="right")) - 1
        last = int(self._edges.searchsorted(end, side="left"))
        inside = self._edges[first : last + 1].clip(begin, end)
        return Pieces(self._starts_D[first:last] + inside[:-1] - self._edges[first:last], inside[1:] - inside[:-1])


class PackedRows(ABC):
    """Rows of one source, each a few pieces of its flat token array."""

    def __init__(self, tokens: np.ndarray, *, sequence_length: int, pad_id: int = 0):
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.pad_id = pad_id

    @abstractmethod
    def pieces(self, index: int) -> Pieces:
        """Which pieces make up row `index` >= 0; together at most sequence_length targets."""

    def __getitem__(self, index: int) -> Row:
        """Row `index`: tokens, targets, segment_ids, positions int32 (T,) and weights float32 (T,).

        Segment 0 and weight 0 at padding.
        """
        rows = empty_rows(1, self.sequence_length)
        self.write(index, rows, 0)
        return {name: values[0] for name, values in rows.items()}

    def write(self, index: int, rows: Row, place: int) -> None:
        """Writes row `index` at `place` of arrays made by empty_rows."""
        write_row(rows, place, self.tokens, self.pieces(index), pad_id=self.pad_id)


class RowShuffle:
    """Rows permuted within blocks of `block_rows`, so that one batch does not hold consecutive rows of one document."""

    def __init__(self, block_rows: int, key: tuple[int | str, ...]):
        self._block_rows = block_rows
        self._key = key
        self._block = lru_cache(maxsize=4)(self._make_block)  # neighbouring rows share a block, threads the cache

    def __call__(self, index: int) -> int:
        if self._block_rows == 1:
            return index
        block, place = divmod(index, self._block_rows)
        return block * self._block_rows + int(self._block(block)[place])

    def _make_block(self, block: int) -> np.ndarray:
        return permutation(self._block_rows, *self._key, "rows", block)


class EndlessRows(PackedRows):
    """Rows of one source for training: full, without padding, without end.

    Each epoch goes through all documents once, in an order drawn from `key` and the epoch. Rows are then
    permuted within blocks of `shuffle_block_rows` rows.
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
        super().__init__(tokens, sequence_length=sequence_length)
        self._starts_D, self._targets_D = starts_D, targets_D
        self._epoch_targets = int(targets_D.sum())
        self._key = key
        self._shuffle_documents = shuffle_documents
        self._shuffle = RowShuffle(shuffle_block_rows, key)
        self._line = lru_cache(maxsize=4)(self._make_line)  # a row touches few epochs; threads may share the cache

    def pieces(self, index: int) -> Pieces:
        begin = self._shuffle(index) * self.sequence_length
        end = begin + self.sequence_length
        pieces = []
        while begin < end:
            epoch, offset = divmod(begin, self._epoch_targets)
            count = min(end - begin, self._epoch_targets - offset)
            pieces.append(self._line(epoch).cut(offset, offset + count))
            begin += count
        if len(pieces) == 1:
            return pieces[0]
        return Pieces(
            np.concatenate([piece.begins for piece in pieces]),
            np.concatenate([piece.lengths for piece in pieces]),
        )

    def _make_line(self, epoch: int) -> DocumentLine:
        if not self._shuffle_documents:
            return DocumentLine(self._starts_D, self._targets_D)
        order = permutation(len(self._starts_D), *self._key, "documents", epoch)
        return DocumentLine(self._starts_D[order], self._targets_D[order])


class OnePassRows(PackedRows):
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
        super().__init__(tokens, sequence_length=sequence_length, pad_id=pad_id)
        self._line = DocumentLine(starts_D, targets_D)

    def __len__(self) -> int:
        return -(-len(self._line) // self.sequence_length)

    def pieces(self, index: int) -> Pieces:
        """Those of row 0 <= `index` < len(self)."""
        begin = index * self.sequence_length
        return self._line.cut(begin, min(begin + self.sequence_length, len(self._line)))


def empty_rows(count: int, sequence_length: int) -> Row:
    """Arrays (count, sequence_length) of every field, not filled."""
    types = {"tokens": np.int32, "targets": np.int32, "weights": np.float32, "segment_ids": np.int32, "positions": np.int32}
    return {name: np.empty((count, sequence_length), kind) for name, kind in types.items()}


def write_row(rows: Row, place: int, tokens: np.ndarray, pieces: Pieces, *, pad_id: int = 0) -> None:
    """Writes pieces of the flat token array into row `place`, one after another, and pads the rest."""
    row = {name: values[place] for name, values in rows.items()}
    length = len(row["tokens"])
    # Copying runs is the faster way for few of them, gathering ids for many.
    few = len(pieces.lengths) <= 8 + length // 512
    used = (_copy_runs if few else _gather)(row, tokens, pieces)
    row["weights"][:used] = 1.0
    if used < length:
        for name, fill in (("tokens", pad_id), ("targets", pad_id), ("weights", 0.0), ("segment_ids", 0), ("positions", 0)):
            row[name][used:] = fill


def padding_row(sequence_length: int, pad_id: int) -> Row:
    """A row of padding alone: segment 0, weight 0."""
    rows = empty_rows(1, sequence_length)
    write_row(rows, 0, np.zeros(0, np.uint16), Pieces(np.zeros(0, np.int64), np.zeros(0, np.int64)), pad_id=pad_id)
    return {name: values[0] for name, values in rows.items()}


def _copy_runs(row: Row, tokens: np.ndarray, pieces: Pieces) -> int:
    count = np.arange(len(row["positions"]), dtype=np.int32)
    used = 0
    for segment, (begin, length) in enumerate(zip(pieces.begins.tolist(), pieces.lengths.tolist(), strict=True), 1):
        end = used + length
        row["tokens"][used:end] = tokens[begin : begin + length]
        row["targets"][used:end] = tokens[begin + 1 : begin + length + 1]
        row["segment_ids"][used:end] = segment
        row["positions"][used:end] = count[:length]
        used = end
    return used


def _gather(row: Row, tokens: np.ndarray, pieces: Pieces) -> int:
    ends = pieces.lengths.cumsum()
    starts, used = ends - pieces.lengths, int(ends[-1])
    line = np.arange(used)
    index = np.repeat(pieces.begins - starts, pieces.lengths) + line
    row["tokens"][:used] = tokens.take(index)
    row["targets"][:used] = tokens.take(index + 1)
    row["segment_ids"][:used] = np.repeat(np.arange(1, len(ends) + 1, dtype=np.int32), pieces.lengths)
    row["positions"][:used] = line - np.repeat(starts, pieces.lengths)
    return used
