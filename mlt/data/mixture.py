"""Mixing sources in fixed proportions: which source supplies row r, and which of its rows, in closed form."""

from collections.abc import Iterable
from functools import lru_cache
from typing import Annotated, Self

import numpy as np
from pydantic import Field

from mlt.config.base import Config
from mlt.config.problems import Problem
from mlt.data.order import permutation
from mlt.data.sources import Source
from mlt.data.synthetic import SyntheticText

BLOCK_SLOTS = 1000


class Weighted(Config):
    """One source of a mixture.

    Attributes:
        source: where its documents come from.
        weight: its share of the rows, relative to the sum of all weights.
    """

    source: Source
    weight: Annotated[float, Field(gt=0)] = 1.0


class Mixture(Config):
    """Sources mixed row by row. Each run of 1000 rows holds each source in exact proportion (to a row),
    shuffled.

    Attributes:
        parts: the sources and their weights.
    """

    parts: Annotated[tuple[Weighted, ...], Field(min_length=1)]

    def problems(self) -> Iterable[Problem]:
        weights = [part.weight for part in self.parts]
        for position, count in enumerate(slots_per_block(weights)):
            if count == 0:
                rule = f"is less than one row in {BLOCK_SLOTS} of the sum {sum(weights):g}"
                yield Problem(f"parts[{position}].weight", weights[position], rule, "raise it, or leave the source out")

    @classmethod
    def example(cls) -> Self:
        return cls(
            parts=(
                Weighted(source=SyntheticText(num_documents=40, seed=1), weight=3.0),
                Weighted(source=SyntheticText(num_documents=20, seed=2), weight=1.0),
            )
        )


def slots_per_block(weights: list[float]) -> tuple[int, ...]:
    """Rows of each source in a block of 1000, by largest remainder; they sum to 1000."""
    exact = [weight * BLOCK_SLOTS / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda source: (counts[source] - exact[source], source))
    for source in by_remainder[: BLOCK_SLOTS - sum(counts)]:
        counts[source] += 1
    return tuple(counts)


class Schedule:
    """The order in which sources take turns: `locate(row)` -> (source, row of that source).

    Blocks of 1000 rows hold slots_per_block rows of each source in an order drawn from `seed` and the block;
    a source uses its own rows 0, 1, 2, ... in turn.
    """

    def __init__(self, counts: tuple[int, ...], seed: int):
        self._counts = counts
        self._seed = seed
        self._block = lru_cache(maxsize=4)(self._make_block)

    def locate(self, row: int) -> tuple[int, int]:
        block, slot = divmod(row, BLOCK_SLOTS)
        sources, turns = self._block(block)
        source = int(sources[slot])
        return source, block * self._counts[source] + int(turns[slot])

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of each slot, and which of the block's turns of that source it is; both (1000,)."""
        sources = np.repeat(np.arange(len(self._counts)), self._counts)
        if len(self._counts) > 1:
            sources = sources[permutation(BLOCK_SLOTS, "mixture", self._seed, block)]
        turns = np.zeros(BLOCK_SLOTS, np.int64)
        for source, count in enumerate(self._counts):
            turns[sources == source] = np.arange(count)
        return sources, turns
