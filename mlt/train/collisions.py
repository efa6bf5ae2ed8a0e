"""Collision statistics of a run's Engram layers, on the first rows of its data: for the report."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from mlt.data.loader import TrainingRows
from mlt.nn.ngram_collisions import collisions
from mlt.run_paths import write_whole
from mlt.train.hashing import engram_layers
from mlt.train.setup import Setup

SAMPLE_TOKENS = 65_536
"""The sample has at least one row and about this many tokens, or those of a hundred batches if that is less."""


def collision_statistics(setup: Setup) -> dict[str, Any] | None:
    """Counts and shares of every layer and order, as `mlt.nn.ngram_collisions.Collisions` names them; None without Engram."""
    layers = list(engram_layers(setup.config))
    if not layers:
        return None
    data, info = setup.config.data, setup.config.model.info(setup.config.data.tokenizer.token_strings())
    count = min(max(SAMPLE_TOKENS // data.sequence_length, 1), 100 * data.batch_size)
    batch = TrainingRows(data, setup.corpus).batch(range(count))
    found = []
    for path, layer in layers:
        orders = collisions(layer.ngram_hash(info), batch["tokens"], batch["segment_ids"])
        found += [{"layer": path, **dataclasses.asdict(order)} for order in orders]
    return {"tokens": int((batch["segment_ids"] > 0).sum()), "orders": found}


def write_collisions(path: Path, setup: Setup) -> None:
    """Write the statistics as JSON, where the model has Engram layers.

    Raises:
        OSError: it cannot be written.
    """
    told = collision_statistics(setup)
    if told is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(told, indent=1) + "\n")
