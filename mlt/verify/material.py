"""What proofs and tests feed to a model: lively weights and packed rows."""

from typing import Any

import jax
import numpy as np

from mlt.config.problems import walk
from mlt.mixers.base import Aux, BuildInfo, Context, Mixer, MixerConfig
from mlt.model.block import Block
from mlt.model.remat import Remat
from mlt.model.stack import Stack
from mlt.nn.param import merge, partition
from mlt.parallel.table import row_fields


def lively(model: Any, seed: int, *, std: float = 0.05) -> Any:
    """Add noise to every trained parameter: what starts at zero would hide a leak behind it."""
    trained, buffers = partition(model)
    rng = np.random.default_rng(seed)
    noisy = jax.tree.map(lambda leaf: leaf + std * rng.standard_normal(leaf.shape, np.float32), trained)
    return merge(noisy, buffers)


class Company(Mixer):
    """A mixer behind the layers that publish what it reads, as one mixer."""

    def __init__(self, config: MixerConfig, info: BuildInfo):
        blocks = tuple(Block(mixers=(mixer,)) for mixer in (*type(config).example_publishers(), config))
        self.stack = Stack(head=blocks).build(info)

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        y_BTD, aux = self.stack(x_BTD, ctx, Remat(mode="none"))
        return y_BTD, {name: value for block in aux["head"] for own in block for name, value in own.items()}

    def init_state(self, batch: int, max_length: int, dtype: Any) -> Any:
        return self.stack.init_state(batch, max_length, dtype)

    def step(self, x_BTD: jax.Array, state: Any, ctx: Context) -> tuple[jax.Array, Any]:
        return self.stack.step(x_BTD, state, ctx)


def described(config: MixerConfig, info: BuildInfo) -> tuple[Mixer, tuple[MixerConfig, ...]]:
    """A mixer's described module, in company if it reads or shares anything, and the configs of all that is in it."""
    if not config.reads(info.d_model) and not config.shares():
        return config.build(info), (config,)
    return Company(config, info), (*type(config).example_publishers(), config)


def packed_rows(
    rng: np.random.Generator, *, rows: int, length: int, num_ids: int, clusters: int = 0, cluster_runs: int = 0
) -> dict[str, np.ndarray]:
    """Rows of ragged documents, some of one token, the last row ending in padding.

    Args:
        clusters: how many there are; each document has one, or none.
        cluster_runs: stretches of one cluster that a row may have; documents behind so many have none, as the loader does it.
    """
    batch = {name: np.zeros((rows, length), np.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
    for row in range(rows):
        end = length - (length // 8 if row == rows - 1 else 0)
        start, segment = 0, 1
        while start < end:
            size = 1 if segment % 3 == 0 else int(rng.integers(2, max(length // 3, 3)))
            stop = min(start + size, end)
            batch["segment_ids"][row, start:stop] = segment
            batch["positions"][row, start:stop] = np.arange(stop - start)
            start, segment = stop, segment + 1
    batch["tokens"] = rng.integers(0, num_ids, (rows, length)).astype(np.int32)
    batch["targets"] = rng.integers(0, num_ids, (rows, length)).astype(np.int32)
    batch["weights"] = (batch["segment_ids"] > 0).astype(np.float32)
    if clusters:
        drawn = rng.integers(-1, clusters, (rows, batch["segment_ids"].max() + 1))
        drawn[:, cluster_runs:] = -1
        batch |= row_fields("clusters", np.take_along_axis(drawn, batch["segment_ids"], axis=1).astype(np.int32))
    return batch


def clusters_of(config: Any) -> dict[str, int]:
    """What `packed_rows` must know of the clusters that the mixers in a config read."""
    found = [node for _, node in walk(config) if isinstance(node, MixerConfig) and node.num_clusters]
    runs = min((node.cluster_runs for node in found), default=0)
    return {"clusters": max((node.num_clusters for node in found), default=0), "cluster_runs": runs}


def shaken(model: Any) -> Any:
    """The model with every parameter moved up or down by 2^-23 of itself: one or two units in its last place."""
    rng = np.random.default_rng(1)

    def move(leaf: Any) -> Any:
        value = np.asarray(leaf)
        if not np.issubdtype(value.dtype, np.floating):
            return leaf
        return value * (1 + np.float32(2.0**-24) * rng.choice([-2, 2], value.shape)).astype(value.dtype)

    return jax.tree.map(move, model)
