"""Tokenised documents on disk, by the hash of their content: shared by hosts and runs, bounded, verified when read."""

import contextlib
import fcntl
import hashlib
import json
import logging
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from mlt.config.base import Config

LOGGER = logging.getLogger("mlt.data")

_HEADER_BYTES = 256
_CHUNK_BYTES = 2**24
_ABANDONED_SECONDS = 24 * 3600  # a half-written file older than this belongs to nobody


class TokenCache(Config):
    """A folder of tokenised documents. It may be shared: a file appears whole or not at all and its name is its content.

    The ids are mapped into memory, not copied, so that processes of one machine share them. A file that is damaged is
    reported, removed and made again. A cache that cannot be written is reported, and the run goes on without it.

    Attributes:
        folder: where the files are; made if need be.
        max_bytes: bound on the files together. The longest unused go first; files that a process has open stay.
    """

    folder: Annotated[str, Field(min_length=1)]
    max_bytes: Annotated[int, Field(ge=1)] = 100_000_000_000

    def tokens(self, key: str, make: Callable[[], tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        """The flat ids and document offsets (int64) stored under `key`, or else those of `make()`, which are then stored."""
        path = Path(os.path.expanduser(self.folder)) / f"tokens-{key}.ids"
        found = _read(path)
        if found is not None:
            return found
        tokens, offsets_D = make()
        try:
            self._write(path, tokens, offsets_D)
        except OSError as error:
            LOGGER.warning("%s: the token cache cannot be written (%s); going on without it", path, error.strerror)
        return tokens, offsets_D

    def _write(self, path: Path, tokens: np.ndarray, offsets_D: np.ndarray) -> None:
        payload = [np.ascontiguousarray(part).view(np.uint8).data for part in (offsets_D, tokens)]
        size = _HEADER_BYTES + sum(part.nbytes for part in payload)
        if size > self.max_bytes:
            LOGGER.warning("%s: %d bytes are more than the token cache's max_bytes=%d; not stored", path, size, self.max_bytes)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self._make_room(path.parent, size)
        header = {
            "documents": len(offsets_D) - 1,
            "tokens": len(tokens),
            "type": tokens.dtype.newbyteorder("<").str,
            "checksum": _checksum(payload),
        }
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".tokens-", suffix=".tmp", delete=False) as file:
            try:
                file.write(json.dumps(header).encode().ljust(_HEADER_BYTES))
                for part in payload:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise

    def _make_room(self, folder: Path, size: int) -> None:
        """Removes the longest unused files until `size` more bytes fit, and what writers left half-written."""
        files = []
        for path in folder.iterdir():
            with contextlib.suppress(OSError):  # another host may remove it first
                status = path.stat()
                if path.suffix == ".ids":
                    files.append((status.st_mtime, status.st_size, path))
                elif path.name.startswith(".tokens-") and status.st_mtime < time.time() - _ABANDONED_SECONDS:
                    path.unlink()
        total = size + sum(held for _, held, _ in files)
        for _, held, path in sorted(files):
            if total <= self.max_bytes:
                return
            with contextlib.suppress(OSError):
                if _remove_unused(path):
                    total -= held


def _read(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """The arrays of a file, mapped and verified; None if it is not there or damaged. It counts as open while they are used."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        LOGGER.warning("%s: the token cache cannot be read (%s); going on without it", path, error.strerror)
        return None
    try:
        with contextlib.suppress(OSError):  # some file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        found = _map(descriptor)
        with contextlib.suppress(OSError):
            os.utime(path)  # when it was last used
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        LOGGER.warning("%s: this token cache file is damaged (%s); making it again", path, error)
        with contextlib.suppress(OSError):
            path.unlink()
        return None
    finally:
        os.close(descriptor)  # the mapping has a duplicate, and with it the lock, for as long as an array uses it


def _map(descriptor: int) -> tuple[np.ndarray, np.ndarray]:
    data = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    header = json.loads(data[:_HEADER_BYTES])
    kind, documents, count = np.dtype(header["type"]), header["documents"], header["tokens"]
    middle = _HEADER_BYTES + 8 * (documents + 1)
    if len(data) != middle + kind.itemsize * count:
        raise ValueError(f"it has {len(data)} bytes, its header says {middle + kind.itemsize * count}")
    if _checksum([memoryview(data)[_HEADER_BYTES:]]) != header["checksum"]:
        raise ValueError("its checksum is wrong")
    offsets_D = np.frombuffer(data, "<i8", documents + 1, _HEADER_BYTES)
    tokens = np.frombuffer(data, kind, count, middle)
    return tokens, offsets_D


def _checksum(parts: list[memoryview]) -> str:
    hasher = hashlib.blake2b(digest_size=16)
    for chunk in _chunks(parts):
        hasher.update(chunk)
    return hasher.hexdigest()


def _chunks(parts: list[memoryview]) -> Iterator[memoryview]:
    for part in parts:
        for first in range(0, part.nbytes, _CHUNK_BYTES):
            yield part[first : first + _CHUNK_BYTES]


def _remove_unused(path: Path) -> bool:
    """Removes a file unless a process has it open (see `_read`)."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
