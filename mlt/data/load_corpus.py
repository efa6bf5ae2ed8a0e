"""Reading, tokenising and splitting the documents of a run, once, before training."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from mlt.data.cluster_rows import RecordClusters
from mlt.data.config import DataConfig
from mlt.data.corpus import Clustered, Corpus, TokenizedSource
from mlt.data.prefetch import run_stoppable
from mlt.data.sources import BadRecord, Documents, Source
from mlt.data.token_cache import TokenCache
from mlt.data.tokenize import Tokenizer
from mlt.errors import UserError

LOGGER = logging.getLogger("mlt.data")

_BATCH_DOCUMENTS = 64  # documents handed to the tokenizer at once
_SHOWN = 20  # bad records that are logged one by one


def load_corpus(config: DataConfig, *, stop: Callable[[], object] | None = None) -> Corpus:
    """Reads and tokenises every document. The ids stay in memory, 2 or 4 bytes each, or are mapped from `config.cache`.

    Reading goes on in a thread, so that a source that is stuck keeps no signal from being heard.

    Raises:
        UserError: a file cannot be read, there are more bad records than config.max_bad_records, a source is empty or one
            side of the split is.
        WaitStopped: `stop()` became true.
    """
    return run_stoppable(lambda: _load(config), stop)


def _load(config: DataConfig) -> Corpus:
    bad = _BadRecords(config.max_bad_records)
    sources, leaves = [], []
    digest = hashlib.blake2b(f"{config.tokenizer.digest}/{config.validation_fraction}".encode(), digest_size=8)
    for part in config.parts:
        source, content, leaves_D = _load_source(part.source, config, bad)
        sources.append(source)
        leaves.append(leaves_D)
        digest.update(content)
    held_out = sum(int(source.held_out_D.sum()) for source in sources)
    if config.validation_fraction > 0 and held_out == 0:
        raise UserError(
            f"no document is left for validation: validation_fraction={config.validation_fraction} of "
            f"{sum(len(source.held_out_D) for source in sources)} documents, chosen by content, selects "
            "none. Raise validation_fraction, give more documents, or set it to 0 to train without "
            "validation."
        )
    corpus = Corpus(sources=tuple(sources), tokenizer=config.tokenizer, hash=digest.hexdigest(), bad_records=bad.count)
    if config.clusters is not None and config.clusters.from_records:
        corpus._clustered[config.clusters] = Clustered(None, leaves)
    return corpus


@dataclass
class _BadRecords:
    """Counts the records that cannot be read as text, and gives up above a limit."""

    limit: int
    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, error: BadRecord) -> None:
        self.count += 1
        if self.count > self.limit:
            if self.limit == 0:
                raise error
            raise UserError(
                f"more than data.max_bad_records={self.limit} records cannot be read as text; the first:\n"
                + "\n".join(f"  {message}" for message in self.first)
                + "\nRepair or remove them, or raise data.max_bad_records to train without them."
            ) from error
        if self.count <= _SHOWN:
            self.first.append(str(error))
            LOGGER.warning("left out bad record %d of at most %d: %s", self.count, self.limit, error)
        elif self.count == _SHOWN + 1:
            LOGGER.warning("further bad records are counted, not shown")


class _Kept(Sequence[str]):
    """The names of the documents that were kept."""

    def __init__(self, names: Sequence[str], kept_D: np.ndarray):
        self._names = names
        self._kept_D = kept_D

    def __len__(self) -> int:
        return len(self._kept_D)

    def __getitem__(self, document: int) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._names[int(self._kept_D[document])]


def _load_source(source: Source, config: DataConfig, bad: _BadRecords) -> tuple[TokenizedSource, bytes, np.ndarray]:
    """The tokenised source, the hash of its content, and the leaves that its records bring."""
    documents = source.documents()
    read = _reader(source, documents, config)
    kept, hashes, leaves, bytes_read = [], [], [], 0
    for index in range(len(documents)):
        try:
            data, leaf = read(index)
        except BadRecord as error:
            bad.add(error)
            continue
        if data:
            kept.append(index)
            leaves.append(leaf)
            hashes.append(hashlib.blake2b(data, digest_size=16).digest())
            bytes_read += len(data)
    if not kept:
        raise UserError(
            f"nothing to read in {documents.origin}: {len(documents)} documents, none with any text. "
            "Give files with text in them."
        )
    limit = int(config.validation_fraction * 2**64)
    held_out_D = np.array([int.from_bytes(value[:8], "big") < limit for value in hashes])
    if held_out_D.all():
        raise UserError(
            f"no document is left for training: all {len(kept)} of {documents.origin} fall to validation, "
            f"which takes validation_fraction={config.validation_fraction} of the documents by content. "
            "Give more documents or lower validation_fraction."
        )
    text = hashlib.blake2b(b"".join(hashes), digest_size=16).digest()
    leaves_D = np.array([leaf for leaf in leaves if leaf is not None], np.int32)
    # Ids are cached by the text alone; a position in the data belongs to the clusters too.
    content = text if len(leaves_D) == 0 else hashlib.blake2b(text + leaves_D.astype("<i4").tobytes(), digest_size=16).digest()
    identity = hashlib.blake2b(f"{config.tokenizer.digest}/{config.validation_fraction}".encode() + content, digest_size=8)
    tokens, offsets_D = _tokenize_cached(documents, kept, config.tokenizer, text, config.cache)
    names = _Kept(documents.names, np.array(kept))
    made = TokenizedSource(documents.origin, tokens, offsets_D, held_out_D, bytes_read, identity.hexdigest(), names)
    return made, content, leaves_D


def _reader(source: Source, documents: Documents, config: DataConfig) -> Callable[[int], tuple[bytes, int | None]]:
    """Index -> a document's UTF-8 text, and its leaf where records bring it. Documents without text need none."""
    clusters, brought = config.clusters, documents.clusters
    if not isinstance(clusters, RecordClusters):
        return lambda index: (documents[index].encode("utf-8"), None)
    if brought is None:
        raise UserError(
            f"{documents.origin}: data.clusters takes clusters from the records, and {type(source).__name__} names no field "
            "with them. Name it, or place documents by their words with Clusters(...)."
        )

    def read(index: int) -> tuple[bytes, int | None]:
        text, value = brought.read(index)
        return text.encode("utf-8"), clusters.leaf(value, f"{documents.names[index]}: {brought.name}") if text else None

    return read


def _tokenize(documents: Documents, kept: list[int], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Flat ids and document offsets of the documents `kept`."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    bos, eos = np.array([tokenizer.bos_id], dtype), np.array([tokenizer.eos_id], dtype)
    pieces, lengths = [], []
    for first in range(0, len(kept), _BATCH_DOCUMENTS):
        texts = [documents[index] for index in kept[first : first + _BATCH_DOCUMENTS]]
        for ids in tokenizer.encode_batch(texts):
            pieces += [bos, ids.astype(dtype), eos]
            lengths.append(len(ids) + 2)
    return np.concatenate(pieces), np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _tokenize_cached(
    documents: Documents, kept: list[int], tokenizer: Tokenizer, content: bytes, cache: TokenCache | None
) -> tuple[np.ndarray, np.ndarray]:
    if cache is None:
        return _tokenize(documents, kept, tokenizer)
    key = hashlib.blake2b(content + tokenizer.digest.encode(), digest_size=16).hexdigest()
    return cache.tokens(key, lambda: _tokenize(documents, kept, tokenizer))
