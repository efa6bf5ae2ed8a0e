"""Seeded permutations that any process, platform and numpy version computes alike.

Only the raw words of the Philox generator are used: numpy guarantees that stream, but not the streams of the
methods built on it (permutation, integers, choice).
"""

import hashlib

import numpy as np


def random_words(count: int, *key: int | str) -> np.ndarray:
    """`count` uniform uint64 words, a pure function of `key`."""
    seed = hashlib.blake2b("/".join(str(part) for part in key).encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(seed, "little")).random_raw(count)


def permutation(length: int, *key: int | str) -> np.ndarray:
    """A permutation of range(length) as int64 (length,), a pure function of `key`."""
    return np.argsort(random_words(length, *key), kind="stable")
