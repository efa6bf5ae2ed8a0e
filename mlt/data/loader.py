"""From a corpus to batches: every batch is a function of (corpus, seed, position), on any number of hosts.

This is the module to import from: DataConfig, load_corpus, open_loader, validation_batches.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mlt.data.config import DataConfig
from mlt.data.corpus import Corpus, load_corpus
from mlt.data.mixture import Schedule, slots_per_block
from mlt.data.pack import EndlessRows, OnePassRows, Row, padding_row
from mlt.errors import UserError

__all__ = [
    "Corpus",
    "DataConfig",
    "Loader",
    "TrainingRows",
    "load_corpus",
    "open_loader",
    "validation_batches",
]

Batch = dict[str, np.ndarray]
_LAST_ROW = 2**50  # Grain wants a length; no run gets here


class TrainingRows:
    """The endless rows of a run: `rows[r]` is a pure function of the corpus, the config's seed and r."""

    def __init__(self, config: DataConfig, corpus: Corpus):
        self._schedule = Schedule(_slots(config), config.seed)
        self._rows = [
            EndlessRows(
                source.tokens,
                *source.split("train"),
                sequence_length=config.sequence_length,
                key=(config.seed, position),
                shuffle_documents=config.shuffle_documents,
                shuffle_block_rows=config.shuffle_block_rows,
            )
            for position, source in enumerate(corpus.sources)
        ]

    def __getitem__(self, index: int) -> Row:
        source, row = self._schedule.locate(index)
        return self._rows[source][row]


class _HostRows:
    """What one host reads: the same places of each global batch. A random-access source for Grain."""

    def __init__(self, rows: TrainingRows, *, first_row: int, batch_size: int, places: Sequence[int]):
        self._rows = rows
        self._first_row = first_row
        self._batch_size = batch_size
        self._places = places

    def __len__(self) -> int:
        return _LAST_ROW

    def __getitem__(self, index: int) -> Row:
        step, place = divmod(index, len(self._places))
        return self._rows[self._first_row + step * self._batch_size + self._places[place]]


class Loader(Iterator[Batch]):
    """Yields this host's part of one global batch after another, without end; made by open_loader.

    Attributes:
        last_wait_seconds: how long the last `next` waited for its batch.
    """

    def __init__(self, config: DataConfig, corpus: Corpus, *, first_row: int, places: Sequence[int]):
        import grain  # takes most of a second, so only where batches are read

        self._identity = _identity(config, corpus)
        self._config = config
        self._next_row = first_row
        self.last_wait_seconds = 0.0
        rows = _HostRows(TrainingRows(config, corpus), first_row=first_row, batch_size=config.batch_size, places=places)
        batches = grain.MapDataset.source(rows).batch(len(places))
        ahead = config.prefetch_batches
        options = grain.ReadOptions(num_threads=min(ahead, 2), prefetch_buffer_size=ahead)
        self._batches = iter(batches.to_iter_dataset(options))

    def __next__(self) -> Batch:
        """The next batch: tokens, targets, segment_ids, positions int32, weights float32; (places, T)."""
        started = time.perf_counter()
        batch = next(self._batches)
        self.last_wait_seconds = time.perf_counter() - started
        self._next_row += self._config.batch_size
        return batch

    def state(self) -> dict[str, Any]:
        """Where the next batch starts, and what the stream is made of; plain JSON, the same on every host."""
        tokens = self._next_row * self._config.sequence_length
        return {"tokens": tokens, "rows": self._next_row, **self._identity}

    def close(self) -> None:
        """Stops the background threads."""
        self._batches.close()


def open_loader(
    config: DataConfig,
    corpus: Corpus,
    *,
    first_step: int = 0,
    state: Mapping[str, Any] | None = None,
    host_index: int = 0,
    host_count: int = 1,
    places: Sequence[int] | None = None,
) -> Loader:
    """Opens the training batches at global batch `first_step`, or where the loader that gave `state` stood.

    The concatenation of the hosts' batches is the same global batch for any `host_count` that divides
    batch_size. Where hosts do not hold equal slices, `places` says which rows of each global batch this one
    reads, instead of `host_index` and `host_count`. A state may be taken up with another batch_size or
    sequence_length: reading goes on at the same token. (Where rows are shuffled and sequence_length changes,
    rows of the block at hand can come twice or not at all.) Raises UserError if the hosts do not divide the
    batch, or the state belongs to another stream.
    """
    places = _slice(config, host_index, host_count) if places is None else places
    first_row = first_step * config.batch_size if state is None else _row_of_state(state, config, corpus)
    return Loader(config, corpus, first_row=first_row, places=places)


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
        return self._sources[source][row]


def _slots(config: DataConfig) -> tuple[int, ...]:
    return slots_per_block([part.weight for part in config.parts])


def _identity(config: DataConfig, corpus: Corpus) -> dict[str, Any]:
    """What must be the same for a position to mean the same."""
    return {
        "corpus_hash": corpus.hash,
        "seed": config.seed,
        "rows_per_thousand": list(_slots(config)),
        "shuffle_documents": config.shuffle_documents,
        "shuffle_block_rows": config.shuffle_block_rows,
    }


def _row_of_state(state: Mapping[str, Any], config: DataConfig, corpus: Corpus) -> int:
    identity = _identity(config, corpus)
    missing = sorted({"tokens", *identity} - set(state))
    if missing:
        raise UserError(
            f"the saved data position lacks {', '.join(missing)}: it was not written by this loader or is "
            "damaged. Restore an older checkpoint."
        )
    if state["corpus_hash"] != corpus.hash:
        raise UserError(
            f"the documents differ from those of the saved run: corpus hash {corpus.hash}, saved "
            f"{state['corpus_hash']}. A position in one is no position in the other. Bring the same "
            "documents (and, for PythonStdlib, the same Python version), tokenizer and validation_fraction "
            "back, or start a new run directory."
        )
    changed = [f"{name}={identity[name]} (saved {state[name]})" for name in identity if identity[name] != state[name]]
    if changed:
        raise UserError(
            f"the order of the data differs from that of the saved run: data {', '.join(changed)}. "
            "Set the saved values again, or start a new run directory."
        )
    row, rest = divmod(state["tokens"], config.sequence_length)
    if rest:
        raise UserError(
            f"data.sequence_length={config.sequence_length} does not divide the saved position of "
            f"{state['tokens']} tokens. Use a length that divides it, such as the old one or a half of it."
        )
    return row


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
