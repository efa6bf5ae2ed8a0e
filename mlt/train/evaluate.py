"""Held-out loss and bits per byte."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from mlt.data.cluster_rows import FIELD, GENERIC
from mlt.data.loader import validation_batches
from mlt.data.rows import Batch
from mlt.model.lm import LM
from mlt.train.clusters import cluster_fields
from mlt.train.feed import Feed
from mlt.train.host_tables import HostTables
from mlt.train.setup import Setup
from mlt.train.state import abstract_batch
from mlt.train.step import eval_step


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """Attributes:
    loss: mean nats per target token.
    bits_per_byte: total bits over the bytes of text that the targets stand for.
    tokens: targets counted.
    generic: the same tokens, all documents reading the generic block; None where that is not asked for.
    """

    loss: float
    bits_per_byte: float
    tokens: int
    generic: "EvalResult | None" = None

    def metrics(self) -> dict[str, float]:
        found = {"eval/loss": self.loss, "eval/bits_per_byte": self.bits_per_byte, "eval/tokens": self.tokens}
        if self.generic is None:
            return found
        return found | {"eval/generic_loss": self.generic.loss, "eval/generic_bits_per_byte": self.generic.bits_per_byte}


_IN_FLIGHT = 2  # batches handed to the devices ahead of the one that is waited for


class Evaluator:
    """Runs the held-out rows through one compiled program of fixed shape; keeps sums, never means of means.

    Attributes:
        tables: those in host memory, which the run puts here.
    """

    def __init__(self, setup: Setup):
        config = setup.config
        data, max_rows = config.data, config.evaluation.max_rows
        self._generic = config.evaluation.generic
        self.feed = Feed(setup.rules, data.batch_size, data.sequence_length)
        # Rows of tables in host memory come with the batch; others are found by the program.
        self.tables, self._hashes = HostTables([], setup.rules), setup.hashes if setup.hashes.on_host else None
        fields = {**cluster_fields(config), **({} if self._hashes is None else self._hashes.fields())}
        self.shapes = abstract_batch(setup.rules, data.batch_size, data.sequence_length, fields)
        places = setup.hashes.reads or self.feed.places
        # Made when they are read: the rows of a large split take ten times the memory of its tokens.
        self.batches = validation_batches(data, setup.corpus, max_rows=max_rows, places=places)
        token_bytes = setup.corpus.tokenizer.token_bytes()
        whole = validation_batches(data, setup.corpus, max_rows=max_rows)
        self.num_bytes = sum(int((token_bytes[batch["targets"]] * (batch["weights"] > 0)).sum()) for batch in whole)
        self.step = jax.jit(functools.partial(eval_step, options=setup.options))

    def compile(self, model: Any) -> None:
        """Compile for an abstract or real model, so that the first evaluation does not wait."""
        if self.batches:
            self.step = self.step.lower(model, self.shapes).compile()

    def __call__(self, model: LM, between: Callable[[], None] = lambda: None) -> EvalResult | None:
        """None where no documents are held out. `between` is called after every batch; what it raises ends the evaluation."""
        if not self.batches:
            return None
        found = self._over(self.batches, model, between)
        if not self._generic:
            return found
        generic = ({**batch, FIELD: np.full_like(batch[FIELD], GENERIC)} for batch in self.batches)
        return dataclasses.replace(found, generic=self._over(generic, model, between))

    def _over(self, batches: Iterable[Batch], model: LM, between: Callable[[], None]) -> EvalResult:
        sums = []
        for batch in batches:
            held, fed = self.tables.enter_evaluation(model, batch if self._hashes is None else self._hashes(batch))
            sums.append(self.step(held, self.feed(fed)))
            jax.block_until_ready(sums[: -1 - _IN_FLIGHT][-1:])
            between()
        nats = float(np.sum([np.asarray(s["nats"], np.float64) for s in sums]))
        weight = float(np.sum([np.asarray(s["weight"], np.float64) for s in sums]))
        return EvalResult(nats / weight, nats / math.log(2) / max(self.num_bytes, 1), int(weight))
