"""Rows of hashed tables computed with the batch, on the host, by the threads that make batches ahead."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlt.config.problems import Problem, walk
from mlt.config.run import RunConfig
from mlt.mixers.channel.engram import Engram
from mlt.nn.ngram_hash import NgramHash, whole_ids
from mlt.parallel.table import row_fields
from mlt.train.residents import Resident

Batch = dict[str, np.ndarray]

DISTINCT_FIELD = "distinct/"
"""Fields of a batch for the host alone: the rows of a layer's table that the batch reads, ascending int64."""


def distinct_field(layer: str) -> str:
    return f"{DISTINCT_FIELD}{layer}"


def engram_layers(config: RunConfig) -> Iterator[tuple[str, Engram]]:
    """(path below the model's stack, config) of every Engram layer, those of a period once."""
    for path, node in walk(config.model.stack):
        if isinstance(node, Engram):
            yield path, node


def hashing_problems(config: RunConfig) -> Iterator[Problem]:
    """Layers that hash on the host under one number and differ: a batch has room for the rows of one of them."""
    first: dict[str, tuple[str, Engram]] = {}
    for path, layer in engram_layers(config):
        if layer.hash_on == "host":
            place, other = first.setdefault(layer.name, (path, layer))
            if other != layer:
                rule = f"is also that of {place}, which differs, and both hash on the host"
                yield Problem(f"model.stack.{path}.layer_id", layer.layer_id, rule, "give each Engram layer a number of its own")


class HostHashes:
    """Adds to a batch the rows that Engram layers with `hash_on="host"` read.

    Attributes:
        layers: their hashes by name.
        on_host: those whose tables lie in host memory.
        reads: rows of a batch that a process must be given although others feed them; None where it is its own.
    """

    def __init__(self, config: RunConfig, tables: Sequence[Resident] = (), keep: Sequence[int] | None = None):
        """Compute nothing.

        Args:
            tables: those in host memory (`residents`); without, their rows are counted as if one host held them.
            keep: rows of the batch that this process feeds, where rows of a table in host memory must be counted over the
                batches of all processes: each then reads the whole batch.
        """
        self._tables = {one.layer: one for one in tables}
        self._keep = keep
        self.reads = None if keep is None else range(config.data.batch_size)
        info = config.model.info(tuple(config.data.tokenizer.token_strings()))
        chosen = {layer.name: layer for _, layer in engram_layers(config) if layer.hash_on == "host"}
        self.on_host = {name for name, layer in chosen.items() if layer.table_on == "host"}
        self.layers: dict[str, NgramHash] = {name: layer.ngram_hash(info) for name, layer in chosen.items()}

    def fields(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What it adds, as one token has it."""
        found: dict[str, Any] = {}
        one = np.zeros((1, 1), np.int32)
        for name, hashed in self.layers.items():
            found |= row_fields(name, self._rows(name, hashed, one, one)[0])
        return {name: jax.ShapeDtypeStruct(array.shape[2:], jnp.dtype(array.dtype)) for name, array in found.items()}

    def __call__(self, batch: Batch) -> Batch:
        """The batch with fields `rows/<layer>` (B, T, S), of two words where the table has more rows than 31 bits count.

        Those of a table in host memory count its rows in the field `distinct/<layer>`.
        """
        fields, distinct = dict(batch), {}
        for name, hashed in self.layers.items():
            rows, distinct_U = self._rows(name, hashed, batch["tokens"], batch["segment_ids"])
            fields |= row_fields(name, rows)
            if distinct_U is not None:
                distinct[distinct_field(name)] = distinct_U
        if self._keep is not None:
            fields = {name: array[list(self._keep)] for name, array in fields.items()}
        return {**fields, **distinct}

    def _rows(self, name: str, hashed: NgramHash, token_ids_BT: np.ndarray, segment_ids_BT: np.ndarray) -> tuple[Any, Any]:
        rows = hashed.rows(token_ids_BT, segment_ids_BT)
        if name not in self.on_host:
            return rows, None
        ids = whole_ids(rows)
        distinct_U, place = np.unique(ids, return_inverse=True)
        none = int(distinct_U[:1].sum() < 0)  # -1 stands first, where there is one
        rows_U, known = distinct_U[none:], self._tables.get(name)
        positions_U = np.arange(rows_U.size) if known is None else known.positions_of(rows_U)
        positions_U = np.concatenate([np.full(none, -1), positions_U])
        return positions_U[place].reshape(ids.shape).astype(np.int32), rows_U
