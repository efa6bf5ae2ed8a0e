"""Clusters of documents: a tree fitted once over bags of their tokens, kept in a file, and each document's leaf in it.

For layers that fetch weights by a document's cluster (hierarchical memories, arXiv 2510.02375). The paper embeds text with a
sentence encoder; here a document is a bag of hashed tokens, so that no other model is needed. Features and centroids are whole
numbers, and sums and distances of them are exact in float64: every machine fits the same tree and finds the same leaves.
"""

import hashlib
import io
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from mlt.data.order import permutation
from mlt.errors import UserError

SCALE = 1024
"""Features have this length before they are rounded: products of two are far below the 2^53 that float64 counts to."""

_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that no two token ids meet before the high bits are taken
_BLOCK_VALUES = 2**22  # of the features that are held at once

EMPTY = np.int32(2**20)
"""Value of the centroids of clusters without documents: farther away than any document."""


@dataclass(frozen=True)
class ClusterTree:
    """Centroids of every level.

    Attributes:
        branching: children of a cluster (k).
        centroids: of each level l = 1, 2, ..., whole numbers as int32 (k^l, F); those of cluster c are the children c k to
            c k + k - 1 of the next. A cluster that no document came to has a centroid that is nobody's, of `EMPTY` values.
    """

    branching: int
    centroids: tuple[np.ndarray, ...]

    @property
    def num_clusters(self) -> int:
        """Leaves."""
        return len(self.centroids[-1])

    @property
    def digest(self) -> str:
        hasher = hashlib.blake2b(str(self.branching).encode(), digest_size=8)
        for level in self.centroids:
            hasher.update(level.astype("<i4").tobytes())
        return hasher.hexdigest()

    def leaves(self, tokens: np.ndarray, offsets_D: np.ndarray) -> np.ndarray:
        """Leaf of each document, int32 (D,): from the root, to the nearest child in turn; the first of equal ones.

        Args:
            tokens, offsets_D: as `TokenizedSource` has them.
        """
        width = self.centroids[0].shape[1]
        found = np.zeros(len(offsets_D) - 1, np.int32)
        step = max(1, _BLOCK_VALUES // width)
        for first in range(0, len(found), step):
            stop = min(first + step, len(found))
            features = features_of(tokens, offsets_D[first : stop + 1], width)
            for level in self.centroids:
                found[first:stop] = _children(features, found[first:stop], level, self.branching)
        return found

    def save(self, path: str) -> None:
        """Writes the tree, whole or not at all."""
        held = io.BytesIO()
        np.savez(held, branching=self.branching, **{f"level_{i}": level for i, level in enumerate(self.centroids, 1)})
        target = Path(os.path.expanduser(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".{target.name}.{os.getpid()}")
        draft.write_bytes(held.getvalue())
        os.replace(draft, target)

    @classmethod
    def load(cls, path: str) -> Self:
        """Raises UserError: there is no such file, or it is no tree."""
        try:
            with np.load(os.path.expanduser(path)) as held:
                levels = tuple(held[f"level_{i}"] for i in range(1, len(held.files)))
                return cls(int(held["branching"]), levels)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}. Make it with tools/fit_clusters.py.") from error
        except (ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: is no cluster tree ({error}). Make it with tools/fit_clusters.py.") from error


def features_of(tokens: np.ndarray, offsets_D: np.ndarray, width: int) -> np.ndarray:
    """Documents as bags of tokens: root of the count of the tokens hashed to each of `width` places, signed, of length `SCALE`.

    Returns:
        (D, width) float64 whole numbers.
    """
    words = tokens[offsets_D[0] : offsets_D[-1]].astype(np.uint64) * np.uint64(_MULTIPLIER)
    place, sign = (words >> np.uint64(33)) % np.uint64(width), 1.0 - 2.0 * ((words >> np.uint64(32)) & np.uint64(1))
    document = np.repeat(np.arange(len(offsets_D) - 1), np.diff(offsets_D))
    index = document * width + place.astype(np.int64)
    bags = np.bincount(index, weights=sign, minlength=(len(offsets_D) - 1) * width).reshape(-1, width)
    rooted = np.sign(bags) * np.sqrt(np.abs(bags))
    # Of counts, so exact: a rounded sum of roots would depend on its order.
    length = np.sqrt(np.maximum(np.abs(bags).sum(1, keepdims=True), 1.0))
    return np.rint(rooted * (SCALE / length))


def fit(
    tokens: np.ndarray, offsets_D: np.ndarray, branching: int, depth: int, *, width: int, rounds: int, seed: int
) -> ClusterTree:
    """Hierarchical k-means: the documents of each cluster are split into `branching` again, `depth` times.

    Args:
        width: of the features (F).
        rounds: of k-means in each cluster; it starts at documents drawn by `seed`.
    """
    features = features_of(tokens, offsets_D, width)
    member = np.zeros(len(features), np.int32)
    levels = []
    for level in range(1, depth + 1):
        centroids = np.full((branching**level, width), EMPTY, np.int32)
        order = np.argsort(member, kind="stable")
        edges = np.searchsorted(member[order], np.arange(branching ** (level - 1) + 1))
        for cluster in range(branching ** (level - 1)):
            own = order[edges[cluster] : edges[cluster + 1]]
            if len(own):
                found = _k_means(features[own], branching, rounds, (seed, level, cluster))
                centroids[cluster * branching : (cluster + 1) * branching] = found
        member = _children(features, member, centroids, branching)
        levels.append(centroids)
    return ClusterTree(branching, tuple(levels))


def _k_means(features: np.ndarray, count: int, rounds: int, key: tuple[int, ...]) -> np.ndarray:
    distinct = np.unique(features, axis=0)
    chosen = distinct[permutation(len(distinct), "clusters", *key)[:count]]
    centroids = np.full((count, features.shape[1]), float(EMPTY))
    centroids[: len(chosen)] = chosen
    for _ in range(rounds):
        nearest = np.argmin(_distances(features, centroids), axis=1)
        sizes = np.bincount(nearest, minlength=count)
        sums = (nearest == np.arange(count)[:, None]).astype(np.float64) @ features
        moved = np.where(sizes[:, None] > 0, np.rint(sums / np.maximum(sizes, 1)[:, None]), centroids)
        if np.array_equal(moved, centroids):
            break
        centroids = moved
    return centroids.astype(np.int32)


def _children(features: np.ndarray, member: np.ndarray, centroids: np.ndarray, branching: int) -> np.ndarray:
    """The child cluster of each document, given the cluster it is in."""
    found = np.empty(len(features), np.int32)
    order = np.argsort(member, kind="stable")
    known, firsts = np.unique(member[order], return_index=True)
    for cluster, own in zip(known, np.split(order, firsts[1:]), strict=True):
        first = int(cluster) * branching
        near = np.argmin(_distances(features[own], centroids[first : first + branching].astype(np.float64)), axis=1)
        found[own] = first + near
    return found


def _distances(features: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Squared distances but for the features' own lengths, exact."""
    return np.square(centroids).sum(1) - 2.0 * (features @ centroids.T)
