"""What every proof works on: a model of the config with lively weights, and its forward pass."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mlt.config.run import RunConfig
from mlt.loss import Batch, context_of
from mlt.mixers.base import Context
from mlt.model.lm import LM
from mlt.model.remat import Remat
from mlt.nn.param import initialize
from mlt.parallel.rules import Rules
from mlt.train.setup import describe_model
from mlt.verify.material import clusters_of, lively, packed_rows, shaken
from mlt.verify.result import largest_difference

MAX_TOKENS = 192
DTYPE = jnp.dtype("float32")


@dataclasses.dataclass(frozen=True)
class Subject:
    """Attributes:
    model: arrays.
    rules: one device.
    remat: the config's memory policy.
    num_ids: token ids the tokenizer can produce.
    length: tokens per row used by the proofs.
    clusters: what of documents' clusters the model reads (`clusters_of`).
    """

    model: LM
    rules: Rules
    remat: Remat
    num_ids: int
    length: int
    clusters: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def rows(self, seed: int, rows: int = 2) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        return packed_rows(rng, rows=rows, length=self.length, num_ids=self.num_ids, **self.clusters)

    def context(self, batch: Batch) -> Context:
        return context_of(batch, self.rules, train=False)

    @functools.cached_property
    def logits(self):
        """Compiled (batch) -> (B, T, V)."""

        def run(model: LM, batch: Batch) -> jax.Array:
            return model.logits(model(self.context(batch), dtype=DTYPE, remat=self.remat)[0])

        return functools.partial(jax.jit(run), self.model)

    def bound(self, batch: Batch, found: float, tolerance: float) -> tuple[float, str]:
        """What two ways to the same logits may differ by, and that in words: the tolerance, or where that is too little, what the
        logits move by when every parameter moves in its last place: no float32 program can be nearer to another."""
        if found <= tolerance:
            return tolerance, f"at most {tolerance:g}"
        exact, moved = (np.asarray(self.logits.func(model, batch)) for model in (self.model, shaken(self.model)))
        real = batch["segment_ids"] > 0
        rounding = largest_difference(exact[real], moved[real])
        return max(
            tolerance, rounding
        ), f"at most {tolerance:g}, or the {rounding:.1e} by which the last place of the parameters moves them"

    @functools.cached_property
    def stream_gradient(self):
        """Compiled (batch) -> gradient (B, T, D) of the summed token log-likelihoods with respect to the embedded tokens."""

        def objective(x_BTD: jax.Array, model: LM, batch: Batch) -> jax.Array:
            hidden, _ = model.stack(x_BTD, self.context(batch), self.remat)
            scores = jax.nn.log_softmax(model.logits(model.norm(hidden)))
            chosen = jnp.take_along_axis(scores, batch["targets"][..., None], axis=-1)[..., 0]
            return jnp.sum(jnp.where(batch["weights"] > 0, chosen, 0.0))

        def run(model: LM, batch: Batch) -> jax.Array:
            return jax.grad(objective)(model.embed(batch["tokens"], DTYPE), model, batch)

        return functools.partial(jax.jit(run), self.model)


def subject_of(config: RunConfig, seed: int) -> Subject:
    """The model of a config with random lively weights, in float32 on one device."""
    model = lively(initialize(describe_model(config), seed), seed + 1)
    length = min(config.data.sequence_length, MAX_TOKENS)
    clusters = clusters_of(config.model.stack)
    return Subject(model, Rules(None), config.remat, config.data.tokenizer.vocab_size, length, clusters)
