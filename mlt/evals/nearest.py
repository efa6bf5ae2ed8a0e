"""Exact nearest neighbours among the entries of a datastore, and the distributions of the next token that they give."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

QUERIES, KEYS = 1024, 8192
"""Entries of a block; a block of squared distances is 32 MB."""

SPARE = 8
"""Neighbours that are looked for beside those wanted: the search rounds distances otherwise than the order that is kept."""


def neighbours_of_all(
    keys_ND: np.ndarray, count: int, *, queries: int = QUERIES, keys: int = KEYS
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """The nearest entries of every entry, its own left out.

    Blocks of queries meet blocks of keys in a matrix product, N^2 D multiply-adds in all, in float32 about the mean key. The
    distances that count are made again from differences, and the neighbours sorted by them; equal ones by their numbers.

    Args:
        keys_ND: float32, N > count; it may be mapped from a file.
        count: neighbours wanted.
        queries, keys: entries of a block.

    Yields:
        (first, number (Q, count) int64, squared distance (Q, count) float32 ascending) of entries first, first + 1, ...
    """
    N = len(keys_ND)
    if not 0 < count < N:
        raise ValueError(f"{N} entries have at most {N - 1} neighbours each, and {count} are asked for")
    taken = min(count + SPARE, N - 1)
    centre_D = _mean(keys_ND)
    for first in range(0, N, queries):
        own = np.asarray(keys_ND[first : first + queries], np.float32)
        q = np.zeros((queries, keys_ND.shape[1]), np.float32)
        q[: len(own)] = own - centre_D
        best = (jnp.full((queries, taken), jnp.inf), jnp.full((queries, taken), N, jnp.int32))
        for start in range(0, N, keys):
            k = np.zeros((keys, keys_ND.shape[1]), np.float32)
            part = np.asarray(keys_ND[start : start + keys], np.float32)
            k[: len(part)] = part - centre_D
            best = _merge(*best, q, k, np.int32(first), np.int32(start), np.int32(N))
        number = np.asarray(best[1][: len(own)], np.int64)
        distance = _distances(own, keys_ND, number)
        order = np.lexsort((number, distance), axis=1)[:, :count]
        yield first, np.take_along_axis(number, order, 1), np.take_along_axis(distance, order, 1)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _merge(best_QA, number_QA, q_QD, k_MD, first, start, total):
    """The best of what was found and of a block of keys; entries behind the last, and a query's own, are at infinity."""
    with jax.default_matmul_precision("highest"):
        distance_QM = jnp.sum(jnp.square(k_MD), axis=1) - 2 * (q_QD @ k_MD.T) + jnp.sum(jnp.square(q_QD), axis=1)[:, None]
    number_M = start + jnp.arange(k_MD.shape[0], dtype=jnp.int32)
    own_QM = number_M == first + jnp.arange(q_QD.shape[0], dtype=jnp.int32)[:, None]
    distance_QM = jnp.where(own_QM | (number_M >= total), jnp.inf, distance_QM)
    taken = best_QA.shape[1]
    near, place = jax.lax.top_k(-distance_QM, min(taken, distance_QM.shape[1]))
    near, number = jnp.concatenate([-best_QA, near], 1), jnp.concatenate([number_QA, number_M[place]], 1)
    near, place = jax.lax.top_k(near, taken)
    return -near, jnp.take_along_axis(number, place, axis=1)


def _mean(keys_ND: np.ndarray) -> np.ndarray:
    total = sum(np.sum(keys_ND[first : first + KEYS], axis=0, dtype=np.float64) for first in range(0, len(keys_ND), KEYS))
    return np.asarray(total / len(keys_ND), np.float32)


def _distances(q_QD: np.ndarray, keys_ND: np.ndarray, number_QA: np.ndarray) -> np.ndarray:
    found = np.empty(number_QA.shape, np.float32)
    for row, (query, numbers) in enumerate(zip(q_QD, number_QA, strict=True)):
        found[row] = np.square(keys_ND[numbers] - query).sum(1)
    return found


def distribution(
    tokens_QK: np.ndarray, distance_QK: np.ndarray, temperature: float, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """p(v) = sum over neighbours k followed by v of exp(-d_k / T) / sum over all of them, as its `width` likeliest tokens.

    Args:
        tokens_QK: the token behind each neighbour.
        distance_QK: squared distances, ascending.
        temperature: T.

    Returns:
        (ids (Q, width) int64, likeliest first and -1 where there are fewer; probabilities (Q, width) float32 that add up to
        1; the share of the whole that the tokens kept had (Q,) float64).
    """
    Q, K = tokens_QK.shape
    order = np.argsort(tokens_QK, axis=1, kind="stable")
    token = np.take_along_axis(tokens_QK, order, 1)
    weight = np.exp(-(distance_QK.astype(np.float64) - distance_QK[:, :1]) / temperature)
    weight = np.take_along_axis(weight, order, 1)
    new = np.ones((Q, K), bool)
    new[:, 1:] = token[:, 1:] != token[:, :-1]
    group = np.cumsum(new, axis=1) - 1
    cell = (np.arange(Q)[:, None] * K + group).ravel()
    mass = np.bincount(cell, weights=weight.ravel(), minlength=Q * K).reshape(Q, K)
    ids = np.full(Q * K, -1, np.int64)
    ids[cell] = token.ravel()
    kept = np.argsort(-mass, axis=1, kind="stable")[:, :width]
    ids, share = np.take_along_axis(ids.reshape(Q, K), kept, 1), np.take_along_axis(mass, kept, 1)
    if width > K:
        ids, share = (np.pad(x, ((0, 0), (0, width - K)), constant_values=fill) for x, fill in ((ids, -1), (share, 0.0)))
    total = share.sum(1, keepdims=True)
    # A weight too small for float64 is no neighbour at all.
    return np.where(share > 0, ids, -1), (share / total).astype(np.float32), (total[:, 0] / mass.sum(1))
