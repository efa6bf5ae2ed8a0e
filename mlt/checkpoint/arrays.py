"""Read the arrays of a step, piece by piece, with the digest of what was read.

Written by Orbax as one zarr array a leaf in an OCDBT store; read through TensorStore, so that only what is asked for is
read and no more than a bounded part of it is in memory beside the result.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from mlt.checkpoint.digest import part_digest, text_of
from mlt.checkpoint.layout import CheckpointError, StepFiles, damaged, unreadable
from mlt.checkpoint.leaves import Leaf
from mlt.checkpoint.storage import is_passing, reason_of
from mlt.checkpoint.stores import RETRIES

PIECE_BYTES = 4 << 20
_NODE_CACHE_BYTES = 32 << 20


Box = Sequence[tuple[int, int]]
"""[start, stop) for each dim."""


class Part(NamedTuple):
    """Attributes:
    values: of a box of an array, in host memory.
    digest: of that box, see `part_digest`.
    """

    values: np.ndarray
    digest: int


class StoredArrays:
    """The arrays of one step, opened by name. Safe to use from several threads."""

    def __init__(self, files: StepFiles) -> None:
        self.files = files
        self._context = ts.Context({"cache_pool#nodes": {"total_bytes_limit": _NODE_CACHE_BYTES}, **RETRIES})

    def open(self, name: str, leaf: Leaf) -> ts.TensorStore:
        """Open one array; nothing of its values is read.

        Raises:
          CheckpointError: it is not there, or of another shape or type than was recorded.
          Unreadable: it cannot be read for now.
        """
        store = {
            "driver": "ocdbt",
            "base": self.files.driver("state/"),
            "path": f"{name}/",
            "cache_pool": "cache_pool#nodes",
        }
        opened = self._call(
            name, ts.open({"driver": "zarr", "kvstore": store}, open=True, read=True, context=self._context).result
        )
        shape = opened.shape if leaf.key_impl is None else opened.shape[: len(leaf.shape)]
        if tuple(shape) != leaf.shape or (leaf.key_impl is None and opened.dtype.name != leaf.dtype):
            have = f"{opened.dtype.name}[{','.join(map(str, opened.shape))}]"
            raise damaged(self.files.name, f"{name} is stored as {have}, not as {leaf.describe()}")
        return opened

    def read(self, name: str, array: ts.TensorStore, box: Box) -> Part:
        """Read a box into one new buffer.

        Beside it, two pieces are in memory at most; a piece is PIECE_BYTES, or one stored chunk where that is larger.
        """
        starts = [start for start, _ in box]
        buffer = np.empty([stop - start for start, stop in box], array.dtype.numpy_dtype)
        into, running = ts.array(buffer) if buffer.ndim else None, []
        for piece in _pieces(box, array):
            if into is None:
                buffer[...] = self._call(name, array.read().result)
                continue
            here = tuple(slice(low - start, high - start) for (low, high), start in zip(piece, starts, strict=True))
            source = array[tuple(slice(low, high) for low, high in piece)].translate_to[tuple(part.start for part in here)]
            running.append(into[here].write(source))
            if len(running) > 1:
                self._call(name, running.pop(0).result)
        for copy in running:
            self._call(name, copy.result)
        return Part(buffer, part_digest(buffer, starts, tuple(array.shape)))

    def pieces(self, name: str, leaf: Leaf) -> Iterator[tuple[Box, Part]]:
        """Read an array piece after piece; one is in memory at a time."""
        if 0 in leaf.shape:
            return
        array = self.open(name, leaf)
        for box in _pieces([(0, size) for size in array.shape], array):
            yield box, self.read(name, array, box)

    def verify(self, name: str, leaf: Leaf) -> None:
        """Read every byte of an array.

        Raises:
          CheckpointError: it cannot be read, or its bits are not those that were saved.
        """
        found = sum(part.digest for _, part in self.pieces(name, leaf))
        if text_of(found) != leaf.digest:
            raise altered(self.files, [name])

    def _call(self, name: str, do: Callable[[], Any]) -> Any:
        try:
            return do()
        except MemoryError:
            raise  # the machine's trouble, not the checkpoint's
        except Exception as error:
            if is_passing(error):
                raise unreadable(self.files.name, f"{name}: {reason_of(error)}") from error
            raise damaged(self.files.name, f"{name}: {reason_of(error)}") from error


def altered(files: StepFiles, names: Sequence[str]) -> CheckpointError:
    """Make the error of arrays whose bits changed since they were saved."""
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return damaged(files.name, f"the bits of {shown} are not those that were saved")


def _pieces(box: Box, array: ts.TensorStore) -> Iterator[list[tuple[int, int]]]:
    """Cut a box along the borders of the stored chunks, into as few pieces of PIECE_BYTES as that allows."""
    chunk = array.chunk_layout.read_chunk.shape or array.shape
    sizes = [max(stop - start, 1) for start, stop in box]
    item = array.dtype.numpy_dtype.itemsize
    for dim in range(len(box)):
        rest = item * int(np.prod(sizes[dim + 1 :], dtype=np.int64)) * int(np.prod(sizes[:dim], dtype=np.int64))
        fitting = max(PIECE_BYTES // rest, 1)
        if sizes[dim] > fitting:
            sizes[dim] = max(fitting // chunk[dim], 1) * chunk[dim]
    return map(list, itertools.product(*(_cuts(*ends, size) for ends, size in zip(box, sizes, strict=True))))


def _cuts(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """Cut [start, stop) at the multiples of `size`."""
    borders = [start, *range((start // size + 1) * size, stop, size), stop]
    return list(itertools.pairwise(borders)) if stop > start else [(start, stop)]
