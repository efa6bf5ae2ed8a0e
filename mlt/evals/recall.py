"""Multi-query associative recall (MQAR, Zoology, arXiv 2312.04927): pairs are shown once, and keys are asked for later."""

from collections.abc import Callable, Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from mlt.config.base import Config
from mlt.config.problems import Problem
from mlt.data.order import random_words
from mlt.loss import context_of
from mlt.model.lm import LM
from mlt.model.remat import Remat
from mlt.parallel.rules import Rules

Split = Literal["train", "test"]
EARLY = 0.01
"""Power of the gap: a slot g is drawn with probability in proportion to (g + 1) ** (EARLY - 1), so most queries come early."""


class RecallTask(Config):
    """Rows of `length` tokens: k1 v1 k2 v2 ... of `pairs` pairs, then each key once more, at a random even place.

    The label at the second place of a key is its value, which is not written there: a model predicts it as the next token.
    Keys are distinct ids of [1, vocab_size / 2), values distinct ids of [vocab_size / 2, vocab_size), fresh in every row.
    Places g = 0, 1, ... behind the pairs are drawn without replacement with probability in proportion to
    (g + 1) ** (0.01 - 1). A row is a pure function of the seed, the split and its index, and no seed of one split is a
    seed of the other.

    Attributes:
        length: tokens of a row, even (L).
        pairs: pairs of a row (P).
        vocab_size: token ids (V).
        filler: what stands where nothing was asked: a random id of the whole vocabulary, or 0.
    """

    length: int = 64
    pairs: int = 4
    vocab_size: int = 8192
    filler: Literal["random", "zero"] = "zero"

    def problems(self) -> Iterator[Problem]:
        if self.pairs < 1:
            yield Problem("pairs", self.pairs, "must be at least 1")
        if self.length % 2 or self.length < 4 * self.pairs:
            yield Problem("length", self.length, f"must be even and at least 4 * pairs = {4 * self.pairs}")
        if self.vocab_size < 2 * self.pairs + 2:
            yield Problem("vocab_size", self.vocab_size, f"must be at least 2 * pairs + 2 = {2 * self.pairs + 2}")

    def rows(self, seed: int, split: Split, indices: range) -> dict[str, np.ndarray]:
        """A batch of the rows with these indices, (len(indices), length); weights are 1 at labels and 0 elsewhere."""
        drawn = [self._row(seed, split, index) for index in indices]
        tokens, targets = (np.stack(column).astype(np.int32) for column in zip(*drawn, strict=True))
        positions = np.broadcast_to(np.arange(self.length, dtype=np.int32), tokens.shape)
        weights = (targets > 0).astype(np.float32)
        return {
            "tokens": tokens,
            "targets": targets,
            "weights": weights,
            "segment_ids": np.ones_like(tokens),
            "positions": positions.copy(),
        }

    def _row(self, seed: int, split: Split, index: int) -> tuple[np.ndarray, np.ndarray]:
        pairs, half, context = self.pairs, self.vocab_size // 2, 2 * self.pairs
        slots = (self.length - context) // 2
        words = random_words(self.vocab_size - 1 + slots + self.length, "recall", seed, split, index)
        keys_, values_, gaps_, filler = np.split(words, np.cumsum([half - 1, self.vocab_size - half, slots]))
        keys, values = 1 + _first(keys_, pairs), half + _first(values_, pairs)
        # The order in which exponential clocks of these rates ring is that of drawing without replacement.
        uniform = (gaps_ + 0.5) / 2.0**64
        clocks = -np.log(uniform) * (1.0 + np.arange(slots)) ** (1.0 - EARLY)
        places = context + 2 * np.argsort(clocks, kind="stable")[:pairs]
        tokens = (filler % self.vocab_size).astype(np.int64) if self.filler == "random" else np.zeros(self.length, np.int64)
        tokens[0:context:2], tokens[1:context:2], tokens[places] = keys, values, keys
        targets = np.zeros(self.length, np.int64)
        targets[places] = values
        return tokens, targets


def accuracy(labels: int, rules: Rules, *, dtype: jnp.dtype, remat: Remat) -> Callable[[LM, dict[str, np.ndarray]], jax.Array]:
    """A compiled function of a model and a batch: the share of the batch's labels that the model thinks likeliest.

    Args:
        labels: of each row, as many in all.
    """

    @jax.jit
    def hits(model: LM, batch: dict[str, jax.Array]) -> jax.Array:
        hidden_BTD, _ = model(context_of(batch, rules, train=False), dtype=dtype, remat=remat)
        places_BP = jax.lax.top_k(batch["weights"], labels)[1]
        asked_BPD = jnp.take_along_axis(hidden_BTD, places_BP[..., None], axis=1)
        found_BP = jnp.argmax(model.logits(asked_BPD), axis=-1)
        return jnp.mean(found_BP == jnp.take_along_axis(batch["targets"], places_BP, axis=1))

    return hits


def _first(words: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` smallest words in ascending order: the head of a random permutation."""
    head = np.argpartition(words, count)[:count] if count < len(words) else np.arange(len(words))
    return head[np.argsort(words[head], kind="stable")]
