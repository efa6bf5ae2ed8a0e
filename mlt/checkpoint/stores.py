"""A place for files that may be a directory or an object store: a few operations on names with slashes.

A path is used through the file system, in pieces; a URL (gs://, s3://, or whatever else TensorStore opens) through
TensorStore, a file at a time.
"""

import errno
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import tensorstore as ts

from mlt.checkpoint.storage import is_passing

_PIECE_BYTES = 8 << 20

_TRIES = {"max_retries": 6, "initial_delay": "1s", "max_delay": "8s"}
RETRIES = {"s3_request_retries": _TRIES, "gcs_request_retries": _TRIES}
"""Context of TensorStore: half a minute for a store that does not answer. Its own patience is a quarter of an hour, silently."""


class StoredFile(NamedTuple):
    """Attributes:
    size: in bytes.
    crc32: of the contents.
    """

    size: int
    crc32: int


class Store(Protocol):
    """Files by name. Every method raises OSError with a readable `strerror` where the place fails."""

    url: str

    def names(self) -> list[str]:
        """Every file, e.g. "20/state/manifest.ocdbt"; empty where there is nothing yet."""
        ...

    def read(self, name: str) -> bytes:
        """The contents of a file; FileNotFoundError where it is missing."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Write a file whole or not at all."""
        ...

    def put(self, name: str, source: Path) -> StoredFile:
        """Copy a file of this machine; size and check sum of what was read from `source`."""
        ...

    def check(self, name: str) -> StoredFile:
        """Read a file again."""
        ...

    def delete(self, prefix: str) -> None:
        """Delete the files whose names start with `prefix`, which ends in a slash or is a whole name."""
        ...

    def driver(self, name: str) -> dict[str, Any]:
        """TensorStore's specification of the key-value store below `name`, which ends in a slash."""
        ...


def open_store(place: str | Path) -> Store:
    """Give the store of a path or a URL; nothing is made or read.

    Raises:
      OSError: a URL that TensorStore does not understand.
    """
    return ObjectStore(str(place)) if "://" in str(place) else Folder(Path(place))


class Folder:
    """A directory. It is made at the first write, and not made again once it has been seen and is gone."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.url = str(self.path)
        self._seen = False

    def names(self) -> list[str]:
        if not self.path.is_dir():
            above = next(path for path in (self.path, *self.path.parents) if path.exists())
            if not above.is_dir():
                raise NotADirectoryError(20, f"{above} is not a directory", str(self.path))
            return []
        self._seen = True
        found = []
        for folder, _, files in os.walk(self.path, onerror=_raise):
            found += [(Path(folder) / file).relative_to(self.path).as_posix() for file in files]
        return sorted(found)

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        self._replace(name, lambda file: file.write(content))

    def put(self, name: str, source: Path) -> StoredFile:
        with source.open("rb") as read:
            return self._replace(name, lambda file: _sum_pieces(read, file.write))

    def check(self, name: str) -> StoredFile:
        with (self.path / name).open("rb") as file:
            return _sum_pieces(file)

    def delete(self, prefix: str) -> None:
        path = self.path / prefix
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def driver(self, name: str) -> dict[str, Any]:
        return {"driver": "file", "path": f"{self.path / name}/"}

    def _replace(self, name: str, fill: Callable[[Any], Any]) -> Any:
        if self._seen and not self.path.is_dir():
            raise FileNotFoundError(2, "the directory is gone", str(self.path))
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self._seen = True
        beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with beside.open("wb") as file:
                result = fill(file)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
        return result


class ObjectStore:
    """A URL, through TensorStore. A write holds one file in memory.

    An S3 store that is not Amazon's is named by AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, as for Amazon's own tools.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._open: ts.KvStore | None = None

    def names(self) -> list[str]:
        return sorted(name.decode() for name in self._call(lambda: self._kv.list().result()))

    def read(self, name: str) -> bytes:
        result = self._call(lambda: self._kv.read(name).result())
        if result.state != "value":
            raise FileNotFoundError(2, "No such file or directory", f"{self.url}/{name}")
        return result.value

    def write(self, name: str, content: bytes) -> None:
        self._call(lambda: self._kv.write(name, content).result())

    def put(self, name: str, source: Path) -> StoredFile:
        content = source.read_bytes()
        self.write(name, content)
        return StoredFile(len(content), zlib.crc32(content))

    def check(self, name: str) -> StoredFile:
        content = self.read(name)
        return StoredFile(len(content), zlib.crc32(content))

    def delete(self, prefix: str) -> None:
        if prefix.endswith("/"):
            self._call(lambda: (self._kv / prefix).delete_range(ts.KvStore.KeyRange()).result())
        else:
            self._call(lambda: self._kv.write(prefix, None).result())

    def driver(self, name: str) -> dict[str, Any]:
        return (self._kv / name).spec().to_json()

    @property
    def _kv(self) -> ts.KvStore:
        if self._open is None:
            self._open = ts.KvStore.open(_specification(self.url), context=ts.Context(RETRIES)).result()
        return self._open

    def _call(self, do: Callable[[], Any]) -> Any:
        try:
            return do()
        except OSError:
            raise
        except Exception as error:  # TensorStore raises ValueError for whatever a store answers
            code = errno.EAGAIN if is_passing(error) else errno.EIO
            raise OSError(code, str(error).split(" [", 1)[0].split("\n", 1)[0], self.url) from error


def _specification(url: str) -> str | dict[str, Any]:
    """What TensorStore opens for a URL."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint is None or not url.startswith("s3://"):
        return f"{url}/"
    bucket, _, path = url.removeprefix("s3://").partition("/")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return {"driver": "s3", "bucket": bucket, "path": f"{path}/", "endpoint": endpoint.rstrip("/"), "aws_region": region}


def _sum_pieces(file: Any, also: Callable[[bytes], Any] | None = None) -> StoredFile:
    size = crc = 0
    while piece := file.read(_PIECE_BYTES):
        size, crc = size + len(piece), zlib.crc32(piece, crc)
        if also is not None:
            also(piece)
    return StoredFile(size, crc)


def _raise(error: OSError) -> None:
    raise error
