"""Cluster ids in batches: which tree a run's documents lie in, and the leaf of each piece of a row."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from mlt.config.base import Config
from mlt.config.problems import Problem
from mlt.data.clusters import ClusterTree, fit
from mlt.data.order import permutation, random_words
from mlt.data.pack import Pieces
from mlt.data.sources import BadRecord
from mlt.errors import UserError

FIELD = "rows/clusters"
"""Field of a batch: the leaf of each token's document, int32 (B, T); -1 for the generic block and at padding."""

GENERIC = -1

MOST_LEAVES = 2**24


class DocumentClusters(Config, ABC):
    """The leaves of a tree of clusters that a run's documents lie in, and how rows bring them.

    Attributes:
        branching: children of a cluster (k).
        depth: levels (p); there are k^p leaves.
        seed: of the draw of generic documents, and of what a subclass draws.
        generic_share: share of the training pieces of documents that read the generic block, 1/17 in arXiv 2510.02375; drawn for
            each row. Validation always fetches.
        max_runs: stretches of one cluster that a row may have, no more than the model's; documents behind so many read the
            generic block.
    """

    branching: Annotated[int, Field(ge=2)] = 16
    depth: Annotated[int, Field(ge=1)] = 4
    seed: Annotated[int, Field(ge=0)] = 0
    generic_share: Annotated[float, Field(ge=0, le=1)] = 1 / 17
    max_runs: Annotated[int, Field(ge=2)] = 16

    @property
    @abstractmethod
    def from_records(self) -> bool:
        """Whether the records of the sources bring the leaves, or a tree finds them."""

    @property
    def num_clusters(self) -> int:
        """Leaves."""
        return self.branching**self.depth

    def problems(self) -> Iterable[Problem]:
        if self.num_clusters > MOST_LEAVES:
            rule = f"makes {self.num_clusters:,} leaves of {self.branching} children each; at most {MOST_LEAVES:,}"
            yield Problem("depth", self.depth, rule, "use fewer levels")


class RecordClusters(DocumentClusters):
    """Clusters that a field of the sources' records brings, found by whoever made the data; the sources name the field.

    Its value is the id of the document's leaf, 0 to k^p - 1, whose base-k digits are the path, most significant first; or a
    list of those p digits, each 0 to k - 1, from the root; or -1, for a document of no cluster, which always reads the generic
    block. A record without it, or with another value, is a bad record. Prompts are placed in no cluster.
    """

    @property
    def from_records(self) -> bool:
        return True

    def leaf(self, value: Any, place: str) -> int:
        """The leaf that a value of the field stands for.

        Args:
            value: as the file has it.
            place: document and field, with which messages start.

        Raises:
            BadRecord: it is no leaf and no path of this tree.
        """
        if isinstance(value, list | tuple):
            if len(value) != self.depth or not all(_is_whole(child) and 0 <= child < self.branching for child in value):
                raise BadRecord(
                    f"{place} holds {_shown(value)}, which is no path: it must have data.clusters.depth = {self.depth} whole "
                    f"numbers, each from 0 to {self.branching - 1}. {_REPAIR}"
                )
            leaf = 0
            for child in value:
                leaf = leaf * self.branching + child
            return leaf
        if not _is_whole(value):
            raise BadRecord(f"{place} holds {_shown(value)}, neither a whole number nor a list of them. {_REPAIR}")
        if not GENERIC <= value < self.num_clusters:
            raise BadRecord(
                f"{place} holds {_shown(value)}, which is no leaf: data.clusters has 0 to {self.num_clusters - 1:,} "
                f"(branching = {self.branching}, depth = {self.depth}), and -1 for a document of no cluster. {_REPAIR}"
            )
        return value


_REPAIR = "Repair or remove the record."


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


class Clusters(DocumentClusters):
    """The cluster tree that a run's documents lie in: fitted when the run starts, or read from a file.

    A fit is the same on every machine and at every start: it depends on these fields and on the first source's documents for
    training. A file, made by `python tools/fit_clusters.py`, is for corpora that are too large to fit at every start, for
    several runs with one tree, and for trees that others made.

    Attributes:
        seed: also of the draw of the sample and of the starts of k-means.
        width: places that a document's tokens are hashed to.
        rounds: of k-means in each cluster.
        sample: documents that are fitted to, drawn from the first source; all of it if it has no more.
        file: a tree of these sizes, in place of a fit.
        digest: of the tree, which the tool prints. With it no other tree is taken; a file needs it.
    """

    width: Annotated[int, Field(ge=1, le=4096)] = 256
    rounds: Annotated[int, Field(ge=1)] = 10
    sample: Annotated[int, Field(ge=1)] = 65_536
    file: Annotated[str, Field(min_length=1)] | None = None
    digest: Annotated[str, Field(min_length=1)] | None = None

    @property
    def from_records(self) -> bool:
        return False

    def problems(self) -> Iterable[Problem]:
        yield from super().problems()
        if self.file is not None and self.digest is None:
            yield Problem("digest", None, "must be that of the file: a checkpoint belongs to its clusters", "the tool prints it")

    def file_problems(self) -> Iterable[Problem]:
        if self.file is not None and not os.path.isfile(os.path.expanduser(self.file)):
            rule = f"does not exist, looked for from {os.getcwd()}"
            yield Problem("file", self.file, rule, "make it with tools/fit_clusters.py")

    def fitted(self, tokens: np.ndarray, starts_D: np.ndarray, lengths_D: np.ndarray) -> ClusterTree:
        """The tree of these documents: where each starts in the flat tokens of the first source, and its tokens."""
        chosen = np.sort(permutation(len(starts_D), "cluster sample", self.seed)[: self.sample])
        parts = [tokens[start : start + length] for start, length in zip(starts_D[chosen], lengths_D[chosen], strict=True)]
        ends = np.concatenate([[0], np.cumsum(lengths_D[chosen])])
        sizes = {"width": self.width, "rounds": self.rounds, "seed": self.seed}
        return fit(np.concatenate(parts), ends, self.branching, self.depth, **sizes)

    def tree(self, tokens: np.ndarray, starts_D: np.ndarray, lengths_D: np.ndarray) -> ClusterTree:
        """The tree of the run; arguments as for `fitted`.

        Raises:
            UserError: the file cannot be read, is of other sizes, or the tree is not the one that `digest` names.
        """
        tree = self.fitted(tokens, starts_D, lengths_D) if self.file is None else ClusterTree.load(self.file)
        where = "the tree fitted to the first source" if self.file is None else self.file
        found, wanted = (tree.branching, len(tree.centroids)), (self.branching, self.depth)
        if found != wanted:
            raise UserError(
                f"{where}: has branching {found[0]} and depth {found[1]}, and data.clusters says {wanted[0]} and {wanted[1]}. "
                "Make them and the model's layers agree."
            )
        if self.digest not in (None, tree.digest):
            raise UserError(
                f"{where}: has the digest {tree.digest}, and data.clusters.digest is {self.digest}. A model's memories belong "
                "to the clusters it was trained with: give that tree, or start a new run with this digest."
            )
        return tree


class RowClusters:
    """Writes the field of rows of one source.

    Args:
        leaves_D: leaf of each document of the source.
        offsets_D: as `TokenizedSource` has them.
        generic_share: of the pieces of a row.
        key: of the draw of those.
    """

    def __init__(self, leaves_D: np.ndarray, offsets_D: np.ndarray, max_runs: int, generic_share: float, *key: int | str):
        self._leaves_D, self._offsets_D, self._max_runs, self._key = leaves_D, offsets_D, max_runs, key
        self._limit = np.uint64(min(int(generic_share * 2**64), 2**64 - 1))

    def write(self, row_T: np.ndarray, pieces: Pieces, index: int) -> None:
        """Fills row `index` of the source, made of these pieces."""
        leaves = self._leaves_D[self._offsets_D.searchsorted(pieces.begins, side="right") - 1].copy()
        if self._limit:
            leaves[random_words(len(leaves), "generic", *self._key, index) < self._limit] = GENERIC
        run = np.cumsum(np.diff(leaves, prepend=leaves[:1]) != 0)
        if run[-1] >= self._max_runs:
            # The last run is that of all that is behind.
            leaves[run >= self._max_runs - 1] = GENERIC
        used = int(pieces.lengths.sum())
        row_T[:used] = np.repeat(leaves, pieces.lengths)
        row_T[used:] = GENERIC
