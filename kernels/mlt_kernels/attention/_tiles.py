"""How the chunked form cuts queries and keys into blocks, which blocks meet, and which of their pairs are visible.

Letters: I query blocks of C queries, J key blocks of L keys, G query heads of a key head; others as in attention.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from mlt_kernels import dispatch

NONE = np.iinfo(np.int32).max
"""No segment id: the least of a block that has none, its negative the greatest."""
MOST_SCORES = 2**24
"""Scores of one pair of blocks off the CPU: 64 MiB of float32."""


class Marks(NamedTuple):
    """What decides visibility, beside the row order: explicit positions and segment ids, None where not given."""

    q_positions: Array | None
    k_positions: Array | None
    q_segments: Array | None
    k_segments: Array | None


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Static facts of one call."""

    queries: int
    keys: int
    C: int
    L: int
    causal: bool
    window: int | None
    softcap: float | None
    scale: float

    @property
    def I(self) -> int:  # noqa: E743
        """Query blocks."""
        return -(-self.queries // self.C)

    @property
    def J(self) -> int:
        """Key blocks."""
        return -(-self.keys // self.L)

    def visible(self, marks: Marks, i: Array, j: Array) -> Array | None:
        """(B or 1, 1, 1, C, L) bool: the visible pairs of query block i and key block j; None if all are."""
        tests = []
        if self.keys % self.L:
            tests.append((j * self.L + jnp.arange(self.L) < self.keys)[None, None, :])
        if self.causal:
            q_pos = self._positions(marks.q_positions, i, self.C, self.keys - self.queries)
            k_pos = self._positions(marks.k_positions, j, self.L, 0)
            distance = q_pos[:, :, None] - k_pos[:, None, :]
            tests.append(distance >= 0)
            if self.window is not None:
                tests.append(distance < self.window)
        if marks.q_segments is not None and marks.k_segments is not None:
            q_seg, k_seg = _take(marks.q_segments, i, self.C), _take(marks.k_segments, j, self.L)
            tests.append((q_seg[:, :, None] == k_seg[:, None, :]) & (k_seg != 0)[:, None, :])
        if not tests:
            return None
        pairs = tests[0]
        for test in tests[1:]:
            pairs = pairs & test
        return pairs[:, None, None]

    def key_blocks(self, marks: Marks) -> tuple[Any, Any]:
        """First and one past the last key block that each query block meets, (I,) int32 each.

        Blocks in between may be hidden too: visible pairs decide, and a hidden pair adds an exact zero.
        """
        met: Any = np.ones((1, self.I, self.J), bool)
        if self.causal:
            q_least, q_most = self._range(marks.q_positions, self.queries, self.C, self.keys - self.queries)
            k_least, k_most = self._range(marks.k_positions, self.keys, self.L, 0)
            met = met & (k_least[:, None, :] <= q_most[:, :, None])
            if self.window is not None:
                met = met & (q_least[:, :, None] - k_most[:, None, :] < self.window)
        if marks.q_segments is not None and marks.k_segments is not None:
            q_least, q_most = _segment_range(marks.q_segments, self.C)
            k_least, k_most = _segment_range(marks.k_segments, self.L)
            met = met & (q_least[:, :, None] <= k_most[:, None, :]) & (k_least[:, None, :] <= q_most[:, :, None])
        met_IJ: Any = met.any(axis=0)
        first = met_IJ.argmax(axis=1).astype(np.int32)
        end = (self.J - met_IJ[:, ::-1].argmax(axis=1)).astype(np.int32) * met_IJ.any(axis=1)
        return first, end

    def _positions(self, given: Array | None, index: Array, size: int, offset: int) -> Array:
        return (index * size + jnp.arange(size) + offset)[None] if given is None else _take(given, index, size)

    def _range(self, given: Array | None, length: int, size: int, offset: int) -> tuple[Any, Any]:
        """Least and greatest position of each block, (B or 1, blocks)."""
        if given is None:
            start = np.arange(0, length, size)[None] + offset
            return start, np.minimum(start + size, length + offset) - 1
        blocks = given.reshape(given.shape[0], -1, size)
        return blocks.min(axis=2), blocks.max(axis=2)


def tiling(q: Array, k: Array, **options: Any) -> Tiling:
    """Block sizes: small ones that stay in cache on a CPU, elsewhere as large as a bound on the scores allows."""
    B, T, N = q.shape[:3]
    S, K = k.shape[1:3]
    if dispatch.platform() == "cpu":
        C, L = max(32, 128 * K // N), 64
    else:
        C = L = next(size for size in (1024, 512, 256, 128) if B * N * size * size <= MOST_SCORES or size == 128)
    C = _even(T, C)
    # Few queries (decoding) take longer key blocks, for the same amount of work a block.
    L = _even(S, max(L, 8192 * K // (N * C)))
    return Tiling(queries=T, keys=S, C=C, L=L, **options)


def pad_tokens(x: Array, length: int, **how: Any) -> Array:
    """Pads dim 1 to `length`."""
    if x.shape[1] == length:
        return x
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2), **how)


def marks(tile: Tiling, segment_ids: Any, positions: Any) -> Marks:
    """Padded to whole blocks: segments with 0, positions with their last value, so that block ranges stay true."""
    q_pos, k_pos = positions if positions is not None and tile.causal else (None, None)
    q_seg, k_seg = segment_ids or (None, None)
    T, S = tile.I * tile.C, tile.J * tile.L
    return Marks(
        None if q_pos is None else pad_tokens(q_pos, T, mode="edge"),
        None if k_pos is None else pad_tokens(k_pos, S, mode="edge"),
        None if q_seg is None else pad_tokens(q_seg, T),
        None if k_seg is None else pad_tokens(k_seg, S),
    )


def _even(length: int, size: int) -> int:
    """Block size near `size` that wastes little of the last block; multiples of 8, so that rows stay aligned."""
    blocks = -(-length // size)
    return min(length, -(-length // (8 * blocks)) * 8)


def _take(x: Array, index: Array, size: int) -> Array:
    return jnp.take(x.reshape(x.shape[0], -1, size), index, axis=1, mode="clip")


def _segment_range(segments: Array, size: int) -> tuple[Array, Array]:
    """Least and greatest segment id of each block, padding left out: an empty range if there is nothing else."""
    blocks = segments.reshape(segments.shape[0], -1, size)
    real = blocks != 0
    return jnp.where(real, blocks, NONE).min(axis=2), jnp.where(real, blocks, -NONE).max(axis=2)
