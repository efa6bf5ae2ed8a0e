"""The documents of a run as ids, and where they lie in a tree of clusters."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mlt.data.cluster_rows import Clusters, DocumentClusters
from mlt.data.clusters import ClusterTree
from mlt.data.tokenize import Tokenizer


@dataclass(frozen=True)
class TokenizedSource:
    """The documents of one source as ids.

    Attributes:
        origin: where they come from.
        tokens: all ids, flat, uint16 or uint32; each document is bos, its ids, eos.
        offsets_D: where each document starts in `tokens`, with the end of the last one, int64 (documents +
            1,).
        held_out_D: which documents are for validation, bool (documents,).
        bytes_read: bytes of UTF-8 text in them.
        hash: changes with any of them, their order, the tokenizer, the split or the clusters that records bring.
        names: file and position of each document.
    """

    origin: str
    tokens: np.ndarray
    offsets_D: np.ndarray
    held_out_D: np.ndarray
    bytes_read: int
    hash: str
    names: Sequence[str]

    def split(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Start and number of targets of each document of the split "train" or "validation", int64."""
        chosen = self.held_out_D if name == "validation" else ~self.held_out_D
        return self.offsets_D[:-1][chosen], np.diff(self.offsets_D)[chosen] - 1


@dataclass(frozen=True)
class Clustered:
    """The leaf of each document of each source, int32, and the tree it was found in; None where records brought the leaves."""

    tree: ClusterTree | None
    leaves: list[np.ndarray]


@dataclass(frozen=True)
class Corpus:
    """The tokenised documents of a run.

    Attributes:
        sources: one per source of the mixture, in its order.
        tokenizer: what made the ids.
        hash: changes with any document, their order, the tokenizer, the split or the clusters that records bring.
        bad_records: how many records were left out because they are not text.
    """

    sources: tuple[TokenizedSource, ...]
    tokenizer: Tokenizer
    hash: str
    bad_records: int = 0
    _clustered: dict[DocumentClusters, Clustered] = field(default_factory=dict, repr=False, compare=False)

    @property
    def bytes_read(self) -> int:
        """Bytes of text in all documents."""
        return sum(source.bytes_read for source in self.sources)

    def clustered(self, clusters: DocumentClusters) -> Clustered:
        """Where the documents lie in the tree of clusters; made once.

        Raises:
            UserError: the tree cannot be had.
        """
        if clusters not in self._clustered:
            if not isinstance(clusters, Clusters):
                raise ValueError("the corpus was loaded with other clusters: those of records are found as they are read")
            starts_D, targets_D = self.sources[0].split("train")
            tree = clusters.tree(self.sources[0].tokens, starts_D, targets_D + 1)
            leaves = [tree.leaves(source.tokens, source.offsets_D) for source in self.sources]
            self._clustered[clusters] = Clustered(tree, leaves)
        return self._clustered[clusters]

    def describe(self) -> str:
        """What was read and from where: one line a source, one for what was left out, and one for the whole."""
        lines = [
            f"read {source.bytes_read:,} bytes of {len(source.held_out_D):,} documents from {source.origin} "
            f"({len(source.tokens):,} tokens; {int(source.held_out_D.sum()):,} documents held out for "
            "validation)"
            for source in self.sources
        ]
        if self.bad_records:
            lines.append(f"left out {self.bad_records:,} bad records")
        return "\n".join([*lines, f"corpus hash {self.hash}"])

    def summary(self, sequence_length: int) -> dict[str, int | float]:
        """Documents and targets for training, and how much of it is long.

        `long_share` is the share of targets from documents of at least `sequence_length` targets: where it is
        low, training at this length mostly sees short documents side by side. `cut_share` is the share of
        documents that cannot fit into one row.
        """
        targets_D = np.concatenate([source.split("train")[1] for source in self.sources])
        long_D = targets_D >= sequence_length
        return {
            "documents": len(targets_D),
            "tokens": int(targets_D.sum()),
            "median_document_tokens": int(np.median(targets_D)),
            "longest_document_tokens": int(targets_D.max()),
            "long_share": float(targets_D[long_D].sum() / targets_D.sum()),
            "cut_share": float((targets_D > sequence_length).mean()),
        }
