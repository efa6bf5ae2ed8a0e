"""The endless rows of a run over all its sources: row r is a function of the corpus, the config and r."""

from collections.abc import Sequence

import numpy as np

from mlt.data.best_fit import BestFitRows
from mlt.data.cluster_rows import FIELD, RowClusters
from mlt.data.config import DataConfig
from mlt.data.corpus import Corpus, TokenizedSource
from mlt.data.mixture import Schedule
from mlt.data.pack import EndlessRows, PackedRows, Row, empty_rows
from mlt.errors import RunFailed, UserError

Batch = dict[str, np.ndarray]


class TrainingRows:
    """`rows[r]` is a pure function of the corpus, the config's seed and r; any thread may ask for any row."""

    def __init__(self, config: DataConfig, corpus: Corpus):
        self._schedule = Schedule(config.mixture.counts(), config.seed)
        self._corpus = corpus
        self._sequence_length = config.sequence_length
        self._sources = [
            _pack(source, config, (config.seed, number), corpus.tokenizer.pad_id) for number, source in enumerate(corpus.sources)
        ]
        self._clusters = row_clusters(config, corpus, "train")
        self._neighbours = None if config.neighbours is None else config.neighbours.opened(corpus)

    def __getitem__(self, row: int) -> Row:
        return {name: values[0] for name, values in self.batch([row]).items()}

    def batch(self, rows: Sequence[int]) -> Batch:
        """These rows as arrays (rows, T).

        Raises:
            RunFailed: a row could not be made; the message says which, and of which documents.
        """
        batch = empty_rows(len(rows), self._sequence_length)
        if self._clusters:
            batch[FIELD] = np.empty_like(batch["tokens"])
        if self._neighbours is not None:
            batch |= self._neighbours.empty(len(rows), self._sequence_length)
        for place, row in enumerate(rows):
            source, turn = self._schedule.locate(row)
            try:
                self._sources[source].write(turn, batch, place)
                if self._clusters:
                    self._clusters[source].write(batch[FIELD][place], self._sources[source].pieces(turn), turn)
                if self._neighbours is not None:
                    self._neighbours.write(batch, place, source, self._sources[source].pieces(turn))
            except UserError:
                raise
            except Exception as error:
                raise RunFailed(self._failure(row, source, turn, error)) from error
        return batch

    def documents(self, row: int) -> list[tuple[str, int, int]]:
        """What a row is made of: name of the document (file and position), first id in it, and number of targets."""
        source, turn = self._schedule.locate(row)
        held, pieces = self._corpus.sources[source], self._sources[source].pieces(turn)
        found = held.offsets_D.searchsorted(pieces.begins, side="right") - 1
        firsts = pieces.begins - held.offsets_D[found]
        return [
            (held.names[int(document)], int(first), int(count))
            for document, first, count in zip(found, firsts, pieces.lengths, strict=True)
        ]

    def padding(self) -> list[float]:
        """Share of each source's row positions that hold no target; 0 where documents are concatenated."""
        return [rows.plan.padding if isinstance(rows, BestFitRows) else 0.0 for rows in self._sources]

    def _failure(self, row: int, source: int, turn: int, error: Exception) -> str:
        try:
            names = ", ".join(dict.fromkeys(name for name, _, _ in self.documents(row)))
        except Exception:
            names = "documents unknown"
        return (
            f"row {row} of the data (row {turn} of {self._corpus.sources[source].origin}: {names}) could not be made: "
            f"{type(error).__name__}: {error}. If files changed or went away under the run, bring them back; the same command "
            "resumes."
        )


def row_clusters(config: DataConfig, corpus: Corpus, split: str) -> list[RowClusters]:
    """What writes the cluster ids of each source's rows; none where there are no clusters."""
    clusters = config.clusters
    if clusters is None:
        return []
    share = clusters.generic_share if split == "train" else 0.0
    return [
        RowClusters(leaves_D, source.offsets_D, clusters.max_runs, share, clusters.seed, number)
        for number, (source, leaves_D) in enumerate(zip(corpus.sources, corpus.clustered(clusters).leaves, strict=True))
    ]


def _pack(source: TokenizedSource, config: DataConfig, key: tuple[int, ...], pad_id: int) -> PackedRows:
    starts_D, targets_D = source.split("train")
    if config.packing == "best_fit":
        return BestFitRows(
            source.tokens,
            starts_D,
            targets_D,
            sequence_length=config.sequence_length,
            window=config.packing_window,
            key=key,
            shuffle_documents=config.shuffle_documents,
            shuffle_block_rows=config.shuffle_block_rows,
            pad_id=pad_id,
        )
    return EndlessRows(
        source.tokens,
        starts_D,
        targets_D,
        sequence_length=config.sequence_length,
        key=key,
        shuffle_documents=config.shuffle_documents,
        shuffle_block_rows=config.shuffle_block_rows,
    )
