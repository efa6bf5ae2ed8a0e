"""Digests of batches that do not depend on how many hosts read them, to prove that two runs saw the same data."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from mlt.data.config import DataConfig
from mlt.data.corpus import Corpus
from mlt.data.rows import TrainingRows

_MASK = 2**64 - 1


def row_digests(batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """A 64-bit hash of each row of a batch, over all of its fields: uint64 (rows,).

    The fields are (rows, T) arrays; names, types and values all count, on machines of either byte order.
    """
    rows = {name: _little_endian(np.asarray(batch[name])) for name in sorted(batch)}
    count = len(next(iter(rows.values())))
    digests = np.empty(count, np.uint64)
    for row in range(count):
        hasher = hashlib.blake2b(digest_size=8)
        for name, values in rows.items():
            hasher.update(f"{name}:{values.dtype.str}:{values.shape[1:]};".encode())
            hasher.update(values[row].tobytes())
        digests[row] = int.from_bytes(hasher.digest(), "little")
    return digests


def batch_digest(batch: Mapping[str, np.ndarray], places: Sequence[int] | None = None) -> int:
    """The part of these rows in the digest of their global batch, an integer below 2**64.

    `places` says which rows of the global batch these are, in order; None takes them for the whole batch. Each row is hashed
    with its place and the hashes are summed, so the parts of any number of hosts, each row on one of them, join to the digest
    of the whole with `join_digests`.
    """
    digests = row_digests(batch)
    places = range(len(digests)) if places is None else places
    parts = [_placed(place, int(digest)) for place, digest in zip(places, digests, strict=True)]
    return join_digests(parts)


def join_digests(parts: Sequence[int]) -> int:
    """The digest of a global batch from those of its parts: their sum modulo 2**64."""
    return sum(parts) & _MASK


def step_digests(config: DataConfig, corpus: Corpus, first_step: int, last_step: int) -> list[int]:
    """The digests of the global batches of steps first_step + 1 to last_step of a run that never skipped data.

    Made from the documents alone, without a model or a device.
    """
    rows, size = TrainingRows(config, corpus), config.batch_size
    return [batch_digest(rows.batch(range(step * size, (step + 1) * size))) for step in range(first_step, last_step)]


def _placed(place: int, digest: int) -> int:
    data = place.to_bytes(8, "little") + digest.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _little_endian(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
