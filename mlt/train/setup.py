"""From a checked config to everything a run needs: mesh, corpus, described model, optimizer, step options."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from mlt.config.run import RunConfig
from mlt.data.loader import Corpus, load_corpus
from mlt.model.lm import LM
from mlt.nn.param import partition
from mlt.parallel.rules import Rules
from mlt.train.distill import frozen
from mlt.train.feed import Feed
from mlt.train.fit import check_batches, check_fits
from mlt.train.hashing import HostHashes
from mlt.train.host_tables import HostTables
from mlt.train.residents import Resident, moving_bytes, num_hosts, on_devices, on_host, residents
from mlt.train.state import TrainState, abstract_state, create_state
from mlt.train.step import StepOptions
from mlt.train.teacher import load_teacher, start_arrays


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is fixed for the whole run.

    Attributes:
        config: the run's config.
        rules: layout on the mesh.
        corpus: tokenized documents.
        specs: the model as described parameters; of tables in host memory, what the devices hold.
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

    def targets_per_byte(self, row: int) -> float:
        """Targets over the bytes of text that they stand for, on average, where the mixture is that of `row`."""
        sources = self.corpus.sources
        shares = [counts for first, counts in self.config.data.mixture.counts() if first <= row][-1]
        # The id that starts a document is nobody's target.
        bytes_per_target = [source.bytes_read / (len(source.tokens) - len(source.held_out_D)) for source in sources]
        return sum(shares) / sum(share * each for share, each in zip(shares, bytes_per_target, strict=True))

    @functools.cached_property
    def hashes(self) -> HostHashes:
        """What the loader's threads add to each training batch."""
        away, data = self.residents, self.config.data
        several = bool(away) and jax.process_count() > 1
        keep = Feed(self.rules, data.batch_size, data.sequence_length).places if several else None
        return HostHashes(self.config, away, keep)

    @functools.cached_property
    def residents(self) -> list[Resident]:
        """The tables that lie in host memory."""
        if not on_host(self.config):
            return []
        return residents(self.config, describe_model(self.config), num_hosts(self.config, self.rules))

    @property
    def whole_specs(self) -> LM:
        """The described model with every table whole, those in host memory too."""
        return describe_model(self.config) if self.residents else self.specs

    def host_tables(self) -> HostTables:
        """The tables that lie in host memory, still empty."""
        return HostTables(self.residents, self.rules, self.config.train.seed)

    def fresh_state(self) -> TrainState:
        """The state before the first step: drawn, or where the model is distilled, taken from the run it starts from."""
        given = start_arrays(self.config, self.specs, self.rules)
        return create_state(self.specs, self.optimizer, self.rules, self.config.train.seed, given)


def step_options(config: RunConfig, rules: Rules, specs: LM) -> StepOptions:
    return StepOptions(
        rules=rules,
        remat=config.remat,
        dtype=jnp.dtype(config.train.compute_dtype),
        grad_accumulation=config.train.grad_accumulation,
        clip_norm=config.train.clip_norm,
        z_loss=config.train.z_loss,
        neighbour_weight=config.train.neighbour_weight or 0.0,
        gradient_places=rules.gradient_shardings(partition(specs)[0]),
        guard=config.train.guard,
    )


def describe_model(config: RunConfig) -> LM:
    """The model as described parameters, told the tokenizer's strings; those that the run does not train are buffers."""
    specs = config.model.build(tuple(config.data.tokenizer.token_strings()))
    return specs if config.train.distill is None else frozen(specs, config.train.distill)


def build_optimizer(config: RunConfig, specs: LM) -> optax.GradientTransformation:
    return config.optimizer.transformation(partition(specs)[0], config.schedule, config.train.steps)


def prepare(config: RunConfig, rules: Rules, stop: Callable[[], object] | None = None) -> Setup:
    """Read the corpus and describe the model. Touches no run directory.

    Raises:
        UserError: the data cannot be read, or the model does not fit the mesh or its devices.
        WaitStopped: `stop()` became true while the corpus was read.
    """
    hosts = num_hosts(config, rules)
    whole = describe_model(config)
    specs = on_devices(config, whole, hosts)
    rules.param_shardings(specs)
    optimizer = build_optimizer(config, specs)
    if config.train.check_memory:
        check_batches(config.data, jax.process_count())
        moving = moving_bytes(residents(config, whole, hosts), rules)
        check_fits(abstract_state(specs, optimizer, rules), specs, rules, besides=moving, lazy=getattr(optimizer, "lazy", ()))
    corpus = load_corpus(config.data, stop=stop)
    if config.data.neighbours is not None:
        config.data.neighbours.opened(corpus)  # refused here where they are those of other documents
    options = dataclasses.replace(step_options(config, rules, specs), teacher=load_teacher(config, rules))
    return Setup(config, rules, corpus, specs, optimizer, options)
