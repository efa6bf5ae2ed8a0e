"""From a checked config to everything a run needs: mesh, corpus, described model, optimizer, step options."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import optax

from mlt.config.run import RunConfig
from mlt.data.loader import Corpus, load_corpus
from mlt.model.lm import LM
from mlt.nn.param import partition
from mlt.parallel.rules import Rules
from mlt.train.step import StepOptions


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is fixed for the whole run.

    Attributes:
        config: the run's config.
        rules: layout on the mesh.
        corpus: tokenized documents.
        specs: the model as described parameters.
        optimizer: the update rule.
        options: what a train step needs.
    """

    config: RunConfig
    rules: Rules
    corpus: Corpus
    specs: LM
    optimizer: optax.GradientTransformation
    options: StepOptions

    @property
    def tokens_per_step(self) -> int:
        return self.config.data.batch_size * self.config.data.sequence_length

    @property
    def tokens_per_byte(self) -> float:
        """Tokens over bytes of the whole corpus."""
        return sum(len(source.tokens) for source in self.corpus.sources) / self.corpus.bytes_read


def step_options(config: RunConfig, rules: Rules, specs: LM) -> StepOptions:
    return StepOptions(
        rules=rules,
        remat=config.remat,
        dtype=jnp.dtype(config.train.compute_dtype),
        grad_accumulation=config.train.grad_accumulation,
        clip_norm=config.train.clip_norm,
        z_loss=config.train.z_loss,
        gradient_places=rules.gradient_shardings(partition(specs)[0]),
        guard=config.train.guard,
    )


def describe_model(config: RunConfig) -> LM:
    """The model as described parameters, told the tokenizer's strings."""
    return config.model.build(tuple(config.data.tokenizer.token_strings()))


def build_optimizer(config: RunConfig, specs: LM) -> optax.GradientTransformation:
    return config.optimizer.transformation(partition(specs)[0], config.schedule, config.train.steps)


def prepare(config: RunConfig, rules: Rules, stop: Callable[[], object] | None = None) -> Setup:
    """Read the corpus and describe the model. Touches no run directory.

    Raises:
        UserError: the data cannot be read, or the model does not fit the mesh.
        WaitStopped: `stop()` became true while the corpus was read.
    """
    specs = describe_model(config)
    rules.param_shardings(specs)
    corpus = load_corpus(config.data, stop=stop)
    return Setup(config, rules, corpus, specs, build_optimizer(config, specs), step_options(config, rules, specs))
