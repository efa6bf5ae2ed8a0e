"""How often the n-grams of a sample fall into one row of a hash table, against what chance gives."""

import dataclasses

import numpy as np

from mlt.nn.ngram_hash import NgramHash, whole_ids


@dataclasses.dataclass(frozen=True)
class Collisions:
    """The tables of one order of one layer, filled with the n-grams of a sample.

    Attributes:
        order: n.
        heads: tables of this order.
        ngrams: distinct n-grams of the sample (D); chance is that of D balls in the rows of a table.
        shared: share of them whose row another one has, averaged over the heads.
        shared_by_chance: what uniform hashing gives on average: 1 - (1 - 1/rows)^(D - 1).
        lost: share of them that no head tells apart from some other: the same row in every table.
        lost_by_chance: the same with the product of the tables' rows.
        touched: rows that the sample reads, all tables of the order together.
        rows: rows there are.
    """

    order: int
    heads: int
    ngrams: int
    shared: float
    shared_by_chance: float
    lost: float
    lost_by_chance: float
    touched: int
    rows: int


def collisions(hashed: NgramHash, token_ids_BT: np.ndarray, segment_ids_BT: np.ndarray) -> list[Collisions]:
    """One entry for each order 2, 3, ... of a layer.

    Args:
        hashed: the layer's hash.
        token_ids_BT: the sample, whole rows of tokens.
        segment_ids_BT: document index inside the row; 0 is padding.
    """
    rows = whole_ids(hashed.rows(token_ids_BT, segment_ids_BT))
    rows_NS, found, first = rows.reshape(-1, rows.shape[-1]), [], 0
    for order, (numbers, primes) in enumerate(
        zip(hashed.ngrams(token_ids_BT, segment_ids_BT), hashed.tables.primes, strict=True), start=2
    ):
        number_N = numbers.reshape(-1)
        known, where = np.unique(number_N, return_index=True)
        rows_DJ = rows_NS[where[known >= 0], first : first + len(primes)]
        found.append(_of_order(order, rows_DJ, primes))
        first += len(primes)
    return found


def _of_order(order: int, rows_DJ: np.ndarray, primes: tuple[int, ...]) -> Collisions:
    count, heads = rows_DJ.shape
    shared, touched = [], 0
    group_D = np.zeros(count, np.int64)
    for head in range(heads):
        rows, place_D, sizes = np.unique(rows_DJ[:, head], return_inverse=True, return_counts=True)
        shared.append(_share(sizes[place_D] > 1))
        touched += len(rows)
        group_D = np.unique(group_D * max(len(rows), 1) + place_D, return_inverse=True)[1]
    lost = _share(np.bincount(group_D, minlength=1)[group_D] > 1)
    by_chance = float(np.mean([_chance(count, 1 / prime) for prime in primes]))
    together = _chance(count, float(np.exp(-np.log(np.array(primes, np.float64)).sum())))
    return Collisions(order, heads, count, float(np.mean(shared)), by_chance, lost, together, touched, sum(primes))


def _share(which: np.ndarray) -> float:
    return float(which.mean()) if which.size else 0.0


def _chance(count: int, of_one: float) -> float:
    """That at least one of the others falls where one does."""
    return float(-np.expm1(max(count - 1, 0) * np.log1p(-of_one))) if of_one < 1 else float(count > 1)
