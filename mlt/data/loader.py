"""From a corpus to batches: every batch is a function of (corpus, seed, position), on any number of hosts.

This is the module to import from: DataConfig, load_corpus, open_loader, validation_batches.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mlt.data.cluster_rows import FIELD, GENERIC
from mlt.data.config import DataConfig
from mlt.data.corpus import Corpus
from mlt.data.load_corpus import load_corpus
from mlt.data.pack import OnePassRows, Row, padding_row
from mlt.data.position import position, row_of
from mlt.data.prefetch import Prefetcher, WaitStopped
from mlt.data.rows import Batch, TrainingRows, row_clusters
from mlt.errors import UserError

__all__ = [
    "Corpus",
    "DataConfig",
    "Loader",
    "TrainingRows",
    "WaitStopped",
    "load_corpus",
    "open_loader",
    "validation_batches",
]

_THREADS = 2  # that make batches ahead


class Loader(Iterator[Batch]):
    """Yields this host's part of one global batch after another, without end; made by open_loader.

    Attributes:
        rows: all the rows of the run, by number.
        last_wait_seconds: how long the last `next` waited for its batch.
    """

    def __init__(
        self,
        config: DataConfig,
        corpus: Corpus,
        *,
        first_row: int,
        places: Sequence[int],
        stop: Callable[[], object] | None = None,
        extend: Callable[[Batch], Batch] | None = None,
    ):
        self.rows = TrainingRows(config, corpus)
        self.last_wait_seconds = 0.0
        self._config, self._corpus = config, corpus
        self._first_row, self._next_row = first_row, first_row
        self._places = places
        self._stop, self._extend = stop, extend
        self._batches = Prefetcher(self._make, ahead=config.prefetch_batches, threads=_THREADS)

    def __next__(self) -> Batch:
        """The next batch: tokens, targets, segment_ids, positions int32, weights float32; (places, T). What `extend` adds, too.

        An error leaves the loader where it is: the next call tries again.

        Raises:
            WaitStopped: `stop` asked to, and the batch was not ready.
            RunFailed: a row could not be made; the message says which, and of which documents.
        """
        started = time.perf_counter()
        batch = self._batches.next(self._stop)
        self.last_wait_seconds = time.perf_counter() - started
        self._next_row += self._config.batch_size
        return batch

    def state(self) -> dict[str, Any]:
        """Where the next batch starts, and what the stream is made of; plain JSON, the same on every host."""
        return position(self._next_row, self._config, self._corpus)

    def close(self) -> None:
        """Stops the background threads; a thread that is stuck in a read is left behind."""
        self._batches.close()

    def _make(self, step: int) -> Batch:
        first = self._first_row + step * self._config.batch_size
        batch = self.rows.batch([first + place for place in self._places])
        return batch if self._extend is None else self._extend(batch)


def open_loader(
    config: DataConfig,
    corpus: Corpus,
    *,
    first_step: int = 0,
    state: Mapping[str, Any] | None = None,
    host_index: int = 0,
    host_count: int = 1,
    places: Sequence[int] | None = None,
    stop: Callable[[], object] | None = None,
    extend: Callable[[Batch], Batch] | None = None,
) -> Loader:
    """Opens the training batches at global batch `first_step`, or where the loader that gave `state` stood.

    The concatenation of the hosts' batches is the same global batch for any `host_count` that divides
    batch_size. Where hosts do not hold equal slices, `places` says which rows of each global batch this one
    reads, instead of `host_index` and `host_count`. `stop` is asked while `next` waits for a batch; when true, `next` raises
    WaitStopped instead of waiting on. `extend` is called with each batch, by the threads that make batches ahead: for fields
    that follow from those of the batch.

    A state may be taken up with another batch_size, other sources behind the old ones, other stages of the mixture from its
    row on, or another sequence_length (see `mlt.data.position.row_of`): reading goes on at the same token. (Where rows are
    shuffled and sequence_length changes, rows of the block at hand can come twice or not at all.)

    Raises:
        UserError: the hosts do not divide the batch, or the state belongs to another stream.
    """
    places = _slice(config, host_index, host_count) if places is None else places
    first_row = first_step * config.batch_size if state is None else row_of(state, config, corpus)
    return Loader(config, corpus, first_row=first_row, places=places, stop=stop, extend=extend)


def validation_batches(
    config: DataConfig,
    corpus: Corpus,
    *,
    max_rows: int | None = None,
    host_index: int = 0,
    host_count: int = 1,
    places: Sequence[int] | None = None,
) -> Sequence[Batch]:
    """The held-out documents as batches of the training shape, made when indexed; none if none is held out.

    One pass in document order, source after source; rows are padded at the end of a source and batches at the
    end. `max_rows` takes that many rows spread evenly over all of them. `places`: as for `open_loader`.
    """
    places = _slice(config, host_index, host_count) if places is None else places
    return _ValidationBatches(config, corpus, max_rows=max_rows, places=places)


class _ValidationBatches(Sequence[Batch]):
    def __init__(self, config: DataConfig, corpus: Corpus, *, max_rows: int | None, places: Sequence[int]):
        self._batch_size = config.batch_size
        self._local = places
        pad_id = corpus.tokenizer.pad_id
        self._padding = padding_row(config.sequence_length, pad_id)
        self._sources = [
            OnePassRows(
                source.tokens,
                *source.split("validation"),
                sequence_length=config.sequence_length,
                pad_id=pad_id,
            )
            for source in corpus.sources
        ]
        self._clusters = row_clusters(config, corpus, "validation")
        if self._clusters:
            self._padding[FIELD] = np.full(config.sequence_length, GENERIC, np.int32)
        found = [(source, row) for source, rows in enumerate(self._sources) for row in range(len(rows))]
        if max_rows is not None and max_rows < len(found):
            found = [found[index * len(found) // max_rows] for index in range(max_rows)]
        self._found = found

    def __len__(self) -> int:
        return -(-len(self._found) // self._batch_size)

    def __getitem__(self, index: int) -> Batch:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not 0 <= index < len(self):
            raise IndexError(index)
        rows = [self._row(index * self._batch_size + place) for place in self._local]
        return {name: np.stack([row[name] for row in rows]) for name in self._padding}

    def _row(self, index: int) -> Row:
        if index >= len(self._found):
            return self._padding
        source, row = self._found[index]
        made = self._sources[source][row]
        if self._clusters:
            made[FIELD] = np.empty_like(made["tokens"])
            self._clusters[source].write(made[FIELD], self._sources[source].pieces(row), row)
        return made


def _slice(config: DataConfig, host_index: int, host_count: int) -> range:
    """Places of one of `host_count` equal slices of a batch."""
    if not 0 <= host_index < host_count:
        raise ValueError(f"host_index={host_index} is not in [0, {host_count})")
    if config.batch_size % host_count:
        above = -(-config.batch_size // host_count) * host_count
        nearest = " or ".join(str(size) for size in (above - host_count, above) if size)
        raise UserError(
            f"data.batch_size={config.batch_size} cannot be split over {host_count} hosts: it must be a "
            f"multiple of the number of hosts. Nearest: {nearest}."
        )
    size = config.batch_size // host_count
    return range(host_index * size, (host_index + 1) * size)
