"""Fit the cluster tree of a config's documents, write it, and print what to put into its data section.

    python tools/fit_clusters.py CONFIG FILE [--arg name=value ...]

The sizes are those of the config's `data.clusters`, whose `file` and `digest` are not looked at. It also says how the documents
of the first source spread over the clusters of each level.
"""

import argparse

import numpy as np

from mlt.config.load import load_config
from mlt.data.cluster_rows import Clusters
from mlt.data.loader import load_corpus
from mlt.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config")
    parser.add_argument("file")
    parser.add_argument("--arg", action="append", default=[])
    given = parser.parse_args()
    data = load_config(given.config, args=given.arg).data
    if not isinstance(data.clusters, Clusters):
        found = "None" if data.clusters is None else f"{type(data.clusters).__name__}, which needs no tree"
        raise UserError(f"{given.config}: data.clusters is {found}; set it to Clusters(branching=..., depth=...)")
    corpus = load_corpus(data.replace(clusters=None))
    source = corpus.sources[0]
    starts_D, targets_D = source.split("train")
    tree = data.clusters.fitted(source.tokens, starts_D, targets_D + 1)
    leaves_D = tree.leaves(source.tokens, source.offsets_D)
    for level in range(1, len(tree.centroids) + 1):
        sizes = np.bincount(leaves_D // tree.branching ** (len(tree.centroids) - level))
        filled = sizes[sizes > 0]
        print(
            f"level {level}: {len(filled):,} of {tree.branching**level:,} clusters hold documents, the largest {filled.max():,}"
        )
    tree.save(given.file)
    print(f"wrote {given.file}; in the config:\n  clusters=Clusters(..., file={given.file!r}, digest={tree.digest!r})")


if __name__ == "__main__":
    main()
