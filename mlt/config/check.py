"""Rules that span sections of a run. All problems are collected, then reported at once."""

from collections.abc import Iterator

from mlt.config.problems import ConfigError, Problem, collect_problems
from mlt.config.run import RunConfig


def check_run(config: RunConfig) -> None:
    """Refuse a config that cannot run, before any device is touched, file written or document read.

    Raises:
        ConfigError: every problem of every section and between them.
    """
    problems = [*collect_problems(config), *cross_section_problems(config)]
    if problems:
        raise ConfigError(problems)


def cross_section_problems(config: RunConfig) -> Iterator[Problem]:
    """Problems between sections, each with its way out."""
    yield from _batch(config)
    tokenizer_vocab = config.data.tokenizer.vocab_size
    if config.model.vocab_size < tokenizer_vocab:
        rule = f"is smaller than the tokenizer's {tokenizer_vocab}"
        yield Problem("model.vocab_size", config.model.vocab_size, rule, f"use {tokenizer_vocab} or more")
    yield from _tensor_shards(config)


def _batch(config: RunConfig) -> Iterator[Problem]:
    batch, micro = config.data.batch_size, config.train.grad_accumulation
    shards = config.mesh.batch_shards
    if micro >= 1 and shards >= 1 and batch % (micro * shards):
        rule = f"must be a multiple of train.grad_accumulation * mesh.replica * mesh.fsdp * mesh.expert = {micro * shards}"
        below = batch // (micro * shards) * micro * shards
        ways = " or ".join(str(n) for n in (below, below + micro * shards) if n)
        yield Problem("data.batch_size", batch, rule, f"use {ways}")


def _tensor_shards(config: RunConfig) -> Iterator[Problem]:
    """Sizes that tensor and expert shards must divide, read from the described parameters."""
    if config.mesh.num_devices == 1 or any(collect_problems(config.model)):
        return
    from mlt.nn.param import named_leaves
    from mlt.parallel.rules import Rules

    rules = Rules(config.mesh.abstract())
    specs = config.model.build(config.data.tokenizer.token_strings())
    for name, spec in named_leaves(specs):
        for line in rules.indivisible(name, spec):
            yield Problem("mesh", config.mesh.shape(), line)
