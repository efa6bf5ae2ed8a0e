"""Between the clusters of a run's documents and the layers that fetch weights by them: what must agree, what a batch brings."""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mlt.config.problems import Problem, walk
from mlt.config.run import RunConfig
from mlt.data.cluster_rows import FIELD, GENERIC, Clusters
from mlt.data.clusters import ClusterTree
from mlt.data.corpus import Corpus
from mlt.errors import UserError
from mlt.mixers.channel.hierarchical_memory import HierarchicalMemory
from mlt.run_paths import RunPaths


def cluster_problems(config: RunConfig) -> Iterator[Problem]:
    """Layers that read clusters which the data has not, or has otherwise; clusters that no layer reads."""
    layers = [(path, node) for path, node in walk(config.model, "model") if isinstance(node, HierarchicalMemory)]
    clusters = config.data.clusters
    if clusters is None:
        if config.evaluation.generic:
            ways_out = "leave it False, or give documents clusters"
            yield Problem("evaluation.generic", True, "needs data.clusters: without them every document is generic", ways_out)
        for path, layer in layers[:1]:
            rule = f"and {path} reads clusters of documents: every document would read the generic block"
            fields = f"branching={layer.branching}, depth={len(layer.units)}, max_runs={layer.max_runs}"
            yield Problem("data.clusters", None, rule, f"set it to Clusters({fields}), of mlt.data.cluster_rows")
        return
    if not layers:
        yield Problem("data.clusters", type(clusters).__name__, "is read by no layer of the model", "leave it None")
    for path, layer in layers:
        for name, ours, theirs in (
            ("branching", layer.branching, clusters.branching),
            ("units", len(layer.units), clusters.depth),
        ):
            if ours != theirs:
                what = f"is for {'levels' if name == 'units' else 'children'}: {ours}, and data.clusters has {theirs}"
                yield Problem(f"{path}.{name}", getattr(layer, name), what, "make them equal")
        if layer.max_runs < clusters.max_runs:
            rule = f"must be at least data.clusters.max_runs = {clusters.max_runs}: tokens of further runs would read no memory"
            yield Problem(f"{path}.max_runs", layer.max_runs, rule)


def keep_tree(path: Path, config: RunConfig, corpus: Corpus, *, write: bool) -> None:
    """Keep the run's cluster tree with it: a model's memories belong to its clusters.

    Args:
        path: of the tree in the run directory.
        write: False for processes that leave writing to another.

    Raises:
        UserError: the run has another tree, or the tree cannot be had.
    """
    tree = None if config.data.clusters is None else corpus.clustered(config.data.clusters).tree
    if tree is None:
        return
    if path.exists():
        kept = ClusterTree.load(str(path))
        if kept.digest != tree.digest:
            raise UserError(
                f"{path}: the run's documents were clustered by a tree with the digest {kept.digest}, and this start has "
                f"{tree.digest}. Bring back the documents of the first source, or name the kept tree: data.clusters.file = a "
                "copy of it, and its digest."
            )
    elif write:
        tree.save(str(path))


def kept_tree(run_dir: Path, config: RunConfig) -> ClusterTree | None:
    """The cluster tree of a run; None where it has none: no clusters, or those that records bring.

    Raises:
        UserError: the file is gone.
    """
    return ClusterTree.load(str(RunPaths(run_dir).clusters_path)) if isinstance(config.data.clusters, Clusters) else None


def cluster_of(tree: ClusterTree | None, ids: np.ndarray) -> int:
    """Leaf of a prompt's ids; -1, the generic block, where there is no tree to place them in."""
    return GENERIC if tree is None else int(tree.leaves(ids, np.array([0, len(ids)]))[0])


def check_cluster(config: RunConfig, cluster: int | None) -> None:
    """Raises UserError where a leaf that is given for a prompt is none of the run's."""
    clusters = config.data.clusters
    if cluster is None:
        return
    if clusters is None:
        raise UserError(f"--cluster {cluster}: the run's documents have no clusters (data.clusters is None). Leave it out.")
    if not GENERIC <= cluster < clusters.num_clusters:
        raise UserError(f"--cluster {cluster}: must be a leaf, 0 to {clusters.num_clusters - 1:,}, or -1 for the generic block")


def cluster_fields(config: RunConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """What the loader adds to a batch, as one token has it."""
    return {} if config.data.clusters is None else {FIELD: jax.ShapeDtypeStruct((), jnp.int32)}
