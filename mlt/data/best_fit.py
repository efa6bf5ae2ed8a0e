"""Best-fit packing by position: documents stay whole, rows are planned from the documents' lengths alone.

Concatenation cuts a document wherever a row ends. Here a document is cut only if it is longer than a row, into full rows and a
rest; the pieces of a window of documents are placed by best-fit decreasing (longest first, each into the fullest row that still
has room; "Fewer Truncations Improve Language Modeling", arXiv 2404.10830). The plan is made once from the index, the same on
every host, so any row is found without the ones before it and there is no buffer to save.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mlt.data.order import permutation
from mlt.data.pack import PackedRows, Pieces, RowShuffle


@dataclass(frozen=True)
class Plan:
    """The rows of one epoch: row r holds pieces first_R[r] .. first_R[r + 1] - 1, in document order.

    Kept in memory: 12 bytes a piece and 8 bytes a row.

    Attributes:
        begins_P: index of each piece's first id in the flat token array, int64 (pieces,).
        lengths_P: targets of each piece, int32 (pieces,).
        first_R: int64 (rows + 1,).
        sequence_length: targets that fit into a row.
    """

    begins_P: np.ndarray
    lengths_P: np.ndarray
    first_R: np.ndarray
    sequence_length: int

    def __len__(self) -> int:
        return len(self.first_R) - 1

    @property
    def padding(self) -> float:
        """Share of the positions of an epoch's rows that hold no target."""
        return 1 - int(self.lengths_P.sum()) / (len(self) * self.sequence_length)


def make_plan(starts_D: np.ndarray, targets_D: np.ndarray, *, sequence_length: int, window: int) -> Plan:
    """Plans the documents in the order given, `window` of them at a time: O(window) memory beside the plan.

    starts_D is the index of each document's first id in the flat token array, targets_D its number of targets, at least 1.
    The rows of a window are ordered by the first document in them.
    """
    begins, lengths, firsts, done = [], [], [], 0
    for low in range(0, len(starts_D), window):
        begins_P, lengths_P = _cut(starts_D[low : low + window], targets_D[low : low + window], sequence_length)
        rows_P = best_fit_decreasing(lengths_P, sequence_length)
        _, heads = np.unique(rows_P, return_index=True)  # the first piece of each row
        rank = np.empty(len(heads), np.int64)
        rank[np.argsort(heads)] = np.arange(len(heads))
        order = np.argsort(rank[rows_P], kind="stable")  # pieces within a row stay in document order
        begins.append(begins_P[order])
        lengths.append(lengths_P[order].astype(np.int32))
        firsts.append(done + np.concatenate([[0], np.cumsum(np.bincount(rank[rows_P]))[:-1]]))
        done += len(order)
    return Plan(np.concatenate(begins), np.concatenate(lengths), np.concatenate([*firsts, [done]]), sequence_length)


def best_fit_decreasing(lengths_P: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each piece, int64 (pieces,), rows numbered in the order they are opened.

    Longest piece first, the earlier of equal ones; each goes into the row with the least room that fits it, the one last left
    with that room if there are several. Every length is in [1, capacity].
    """
    rows_P = np.empty(len(lengths_P), np.int64)
    full = lengths_P == capacity
    opened = int(full.sum())
    rows_P[full] = np.arange(opened)
    rest = np.flatnonzero(~full)
    by_room: dict[int, list[int]] = {}
    rooms = 0  # bit c is set where by_room[c] holds a row
    for piece in rest[np.argsort(-lengths_P[rest], kind="stable")].tolist():
        length = int(lengths_P[piece])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, opened
            opened += 1
        rows_P[piece] = row
        if room > length:
            by_room.setdefault(room - length, []).append(row)
            rooms |= 1 << (room - length)
    return rows_P


class BestFitRows(PackedRows):
    """Rows of one source for training, without end: the rows of a plan, epoch after epoch, padded.

    With `shuffle_documents`, windows are formed from an order of the documents drawn from `key`, and each epoch has its own
    order of the rows; without it, rows follow the documents. Either way rows are then permuted within blocks of
    `shuffle_block_rows`.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        starts_D: np.ndarray,
        targets_D: np.ndarray,
        *,
        sequence_length: int,
        window: int,
        key: tuple[int | str, ...],
        shuffle_documents: bool = True,
        shuffle_block_rows: int = 1,
        pad_id: int = 0,
    ):
        super().__init__(tokens, sequence_length=sequence_length, pad_id=pad_id)
        if shuffle_documents:
            order = permutation(len(starts_D), *key, "windows")
            starts_D, targets_D = starts_D[order], targets_D[order]
        self.plan = make_plan(starts_D, targets_D, sequence_length=sequence_length, window=window)
        self._key = key
        self._shuffle_rows = shuffle_documents
        self._shuffle = RowShuffle(shuffle_block_rows, key)
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def pieces(self, index: int) -> Pieces:
        epoch, row = divmod(self._shuffle(index), len(self.plan))
        if self._shuffle_rows:
            row = int(self._epoch(epoch)[row])
        inside = slice(int(self.plan.first_R[row]), int(self.plan.first_R[row + 1]))
        return Pieces(self.plan.begins_P[inside], self.plan.lengths_P[inside].astype(np.int64))

    def _make_epoch(self, epoch: int) -> np.ndarray:
        return permutation(len(self.plan), *self._key, "plan", epoch)


def _cut(starts_D: np.ndarray, targets_D: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Begins and lengths of the pieces of each document, in order: full rows, then what is left."""
    pieces_D = -(-targets_D // sequence_length)
    document_P = np.repeat(np.arange(len(starts_D)), pieces_D)
    before_P = np.arange(len(document_P)) - np.repeat(np.cumsum(pieces_D) - pieces_D, pieces_D)
    begins_P = starts_D[document_P] + before_P * sequence_length
    lengths_P = np.minimum(targets_D[document_P] - before_P * sequence_length, sequence_length)
    return begins_P, lengths_P
