"""Reading files that may be compressed, by their suffix: .gz and .zst, anything else as it is."""

import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from mlt.data.sources import require_package
from mlt.errors import UserError

SUFFIXES = (".gz", ".zst")


@contextmanager
def open_binary(path: str) -> Iterator[IO[bytes]]:
    """The decompressed bytes of a file, to be read from start to end.

    Raises:
        UserError: it cannot be opened or read, is damaged or cut off, or no installed package can decompress it.
    """
    try:
        with open(path, "rb") as raw:
            if path.endswith(".gz"):
                yield gzip.GzipFile(fileobj=raw, mode="rb")  # pyright: ignore[reportReturnType]
            elif path.endswith(".zst"):
                yield _zstandard(raw, path)
            else:
                yield raw
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.strerror is not None:
            raise UserError(f"{path}: cannot be read: {error.strerror}. Check the path and its permissions.") from error
        raise UserError(
            f"{path}: the compressed file is damaged or cut off: {error}. Copy it again, or take what is whole out of it with "
            "the tool that wrote it."
        ) from error


def read_lines(path: str) -> Iterator[bytes]:
    """The lines of a file, with their ends. Raises as `open_binary`."""
    with open_binary(path) as file:
        yield from file


def _zstandard(raw: IO[bytes], path: str) -> Any:
    if sys.version_info >= (3, 14):
        from compression import zstd

        return zstd.ZstdFile(raw)
    require_package("pyarrow", f"reading {path}")
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
