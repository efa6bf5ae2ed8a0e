"""Mixing sources in given proportions: which source supplies row r, and which of its rows, in closed form.

The proportions may change at given rows. A row is found from the counts of the stages before it, never by going through them.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Annotated, Self

import numpy as np
from pydantic import Field

from mlt.config.base import Config
from mlt.config.problems import Problem
from mlt.data.order import permutation
from mlt.data.sources import Source
from mlt.data.synthetic import SyntheticText

BLOCK_SLOTS = 1000

Weight = Annotated[float, Field(ge=0)]


class Weighted(Config):
    """One source of a mixture.

    Attributes:
        source: where its documents come from.
        weight: its share of the rows, relative to the sum of all weights; 0 where only a later stage reads it.
    """

    source: Source
    weight: Weight = 1.0


class Stage(Config):
    """Other weights from some row on.

    Attributes:
        from_row: the first row of the run (step * batch_size, in the whole batch) with these weights.
        weights: one for each source; 0 leaves it out.
    """

    from_row: Annotated[int, Field(ge=1)]
    weights: Annotated[tuple[Weight, ...], Field(min_length=1)]


class Mixture(Config):
    """Sources mixed row by row. Each run of 1000 rows holds each source in exact proportion (to a row),
    shuffled.

    Attributes:
        parts: the sources and their weights from row 0 on.
        stages: the rows at which the weights change, ascending. Stages and sources may be added, and later stages changed,
            while a run is under way, so long as every row that was read stays what it was.
    """

    parts: Annotated[tuple[Weighted, ...], Field(min_length=1)]
    stages: tuple[Stage, ...] = ()

    def problems(self) -> Iterable[Problem]:
        first = [part.weight for part in self.parts]
        for position, weight in enumerate(first):
            if weight == 0 and not any(sum(stage.weights[position : position + 1]) for stage in self.stages):
                yield Problem(f"parts[{position}].weight", weight, "is 0 in every stage", "raise it, or leave the source out")
        yield from _share_problems(first, "parts[{}].weight")
        for number, stage in enumerate(self.stages):
            if len(stage.weights) != len(self.parts):
                rule = f"has {len(stage.weights)} weights for {len(self.parts)} sources"
                yield Problem(f"stages[{number}].weights", stage.weights, rule, "give one a source; 0 leaves a source out")
            else:
                yield from _share_problems(stage.weights, f"stages[{number}].weights[{{}}]")
        for number, (before, after) in enumerate(pairwise(self.stages), start=1):
            if after.from_row <= before.from_row:
                rule = f"is not above the {before.from_row} of the stage before"
                yield Problem(f"stages[{number}].from_row", after.from_row, rule, "put the stages in order")

    def counts(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """First row and rows of each source per thousand, of each stage."""
        first = (0, slots_per_block([part.weight for part in self.parts]))
        return (first, *((stage.from_row, slots_per_block(stage.weights)) for stage in self.stages))

    @classmethod
    def example(cls) -> Self:
        return cls(
            parts=(
                Weighted(source=SyntheticText(num_documents=40, seed=1), weight=3.0),
                Weighted(source=SyntheticText(num_documents=20, seed=2), weight=1.0),
            )
        )


def _share_problems(weights: Sequence[float], path: str) -> Iterable[Problem]:
    if sum(weights) == 0:
        yield Problem(path.format(0), weights[0], "and all the others are 0", "give one source at least a weight")
        return
    for position, count in enumerate(slots_per_block(weights)):
        if count == 0 and weights[position] > 0:
            rule = f"is less than one row in {BLOCK_SLOTS} of the sum {sum(weights):g}"
            yield Problem(path.format(position), weights[position], rule, "raise it, or leave the source out")


def slots_per_block(weights: Sequence[float]) -> tuple[int, ...]:
    """Rows of each source in a block of 1000, by largest remainder; they sum to 1000."""
    exact = [weight * BLOCK_SLOTS / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda source: (counts[source] - exact[source], source))
    for source in by_remainder[: BLOCK_SLOTS - sum(counts)]:
        counts[source] += 1
    return tuple(counts)


class Schedule:
    """The order in which sources take turns: `locate(row)` -> (source, row of that source).

    Within a stage, blocks of 1000 rows hold the stage's rows of each source in an order drawn from `seed`, the stage's first
    row and the block; a stage may end within a block. A source uses its own rows 0, 1, 2, ... in turn, through all stages.

    `stages` is what `Mixture.counts` gives: (first row, rows of each source per thousand), starting at row 0.
    """

    def __init__(self, stages: Sequence[tuple[int, tuple[int, ...]]], seed: int):
        self._first_rows = [first for first, _ in stages]
        self._counts = [counts for _, counts in stages]
        self._seed = seed
        self._block = lru_cache(maxsize=4)(self._make_block)
        self._turns_before = [np.zeros(len(self._counts[0]), np.int64)]
        for stage, (first, end) in enumerate(pairwise(self._first_rows)):
            blocks, rest = divmod(end - first, BLOCK_SLOTS)
            sources, _ = self._make_block(stage, blocks)
            partial = np.bincount(sources[:rest], minlength=len(self._counts[0]))
            self._turns_before.append(self._turns_before[-1] + blocks * np.array(self._counts[stage]) + partial)

    def locate(self, row: int) -> tuple[int, int]:
        stage = len(self._first_rows) - 1
        while row < self._first_rows[stage]:
            stage -= 1
        block, slot = divmod(row - self._first_rows[stage], BLOCK_SLOTS)
        sources, turns = self._block(stage, block)
        source = int(sources[slot])
        return source, int(self._turns_before[stage][source]) + block * self._counts[stage][source] + int(turns[slot])

    def _make_block(self, stage: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of each slot, and which of the block's turns of that source it is; both (1000,)."""
        counts, first_row = self._counts[stage], self._first_rows[stage]
        sources = np.repeat(np.arange(len(counts)), counts)
        if max(counts) < BLOCK_SLOTS:
            start = (first_row,) if first_row else ()
            sources = sources[permutation(BLOCK_SLOTS, "mixture", self._seed, *start, block)]
        turns = np.zeros(BLOCK_SLOTS, np.int64)
        for source, count in enumerate(counts):
            turns[sources == source] = np.arange(count)
        return sources, turns
