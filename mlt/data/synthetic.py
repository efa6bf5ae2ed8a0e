"""Made-up text for tests and dry runs: an order-2 Markov chain over a small word list, no files needed."""

from collections.abc import Iterable
from functools import lru_cache
from typing import Annotated, Self

import numpy as np
from pydantic import Field

from mlt.config.problems import Problem
from mlt.data.order import random_words
from mlt.data.sources import Documents, Source

_WORD_LIST = """
the a of and to in that it was for on with as his they at be this from have or by one had not but what all were when we
there can an your which their if do will each about how up out them then she many some so these would other into has
more her two like him see time could no make than first been its who now people my made over did down only way find use
may water long little very after words called just where most know
"""
_WORDS = tuple(_WORD_LIST.split())
_CHOICES = 4  # successors of a pair of words; the chain's entropy is at most 2 bits a word


class SyntheticText(Source):
    """Documents of words; each pair of words has four successors, so there is something to learn.

    Attributes:
        num_documents: number of documents.
        seed: fixes the chain and the documents.
        mean_words: typical length; one document in eight is up to four times as long.
    """

    num_documents: Annotated[int, Field(ge=1)]
    seed: int = 0
    mean_words: Annotated[int, Field(ge=1)] = 200

    def documents(self) -> Documents:
        """The documents; each is made when it is read."""
        return Documents(
            origin=f"a synthetic source with seed {self.seed}",
            names=[f"synthetic-{self.seed}-{index}" for index in range(self.num_documents)],
            read=self._text,
        )

    def file_problems(self) -> Iterable[Problem]:
        return ()

    @classmethod
    def example(cls) -> Self:
        return cls(num_documents=64)

    def _text(self, index: int) -> str:
        if not 0 <= index < self.num_documents:
            raise IndexError(index)
        chain = _chain(self.seed)
        size, stretch = (int(word) for word in random_words(2, "length", self.seed, index))
        length = 1 + size % (2 * self.mean_words * (4 if stretch % 8 == 0 else 1))
        draws = random_words(length, "words", self.seed, index).tolist()
        before, last = index % len(_WORDS), draws[0] % len(_WORDS)
        words = []
        for draw in draws:
            before, last = last, int(chain[before, last, draw % _CHOICES])
            words.append(_WORDS[last])
        return " ".join(words) + ".\n"


@lru_cache(maxsize=4)
def _chain(seed: int) -> np.ndarray:
    """Successors of each pair of words, (words, words, choices)."""
    shape = (len(_WORDS), len(_WORDS), _CHOICES)
    return (random_words(int(np.prod(shape)), "chain", seed) % len(_WORDS)).astype(np.int64).reshape(shape)
