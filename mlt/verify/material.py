"""What proofs and tests feed to a model: lively weights and packed rows."""

from typing import Any

import jax
import numpy as np

from mlt.nn.param import merge, partition


def lively(model: Any, seed: int, *, std: float = 0.05) -> Any:
    """Add noise to every trained parameter: what starts at zero would hide a leak behind it."""
    trained, buffers = partition(model)
    rng = np.random.default_rng(seed)
    noisy = jax.tree.map(lambda leaf: leaf + std * rng.standard_normal(leaf.shape, np.float32), trained)
    return merge(noisy, buffers)


def packed_rows(rng: np.random.Generator, *, rows: int, length: int, num_ids: int) -> dict[str, np.ndarray]:
    """Rows of ragged documents, some of one token, the last row ending in padding."""
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
    return batch
