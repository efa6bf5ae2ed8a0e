"""Rules that span sections of a run. All problems are collected, then reported at once."""

import difflib
from collections.abc import Iterator

from mlt_kernels import dispatch

from mlt.config.dump import to_yaml
from mlt.config.problems import ConfigError, Problem, collect_problems, walk
from mlt.config.run import RunConfig
from mlt.mixers.base import MixerConfig, SequenceMixerConfig
from mlt.nn.param import partition
from mlt.optim.table_problems import table_problems, too_long
from mlt.parallel import carry, crossings
from mlt.plan.text import ring_shape
from mlt.train.clusters import cluster_problems
from mlt.train.hashing import hashing_problems
from mlt.train.neighbours import neighbour_problems
from mlt.train.residents import host_table_problems, on_devices
from mlt.train.teacher import distill_problems

CROSSINGS: dict[str, tuple[str, ...]] = {"ring": crossings.STRATEGIES, "carry": carry.EXCHANGES, "halo": ()}
"""Kind of mixer (`SequenceMixerConfig.context`) -> ways in which what it needs can cross sequence shards."""


def check_run(config: RunConfig) -> None:
    """Refuse a config that cannot run, before any device is touched, file written or document read.

    Raises:
        ConfigError: every problem of every section and between them, missing files included.
        UserError: the config cannot be saved.
    """
    problems = [*collect_problems(config), *cross_section_problems(config)]
    if problems:
        raise ConfigError(problems)
    to_yaml(config)


def cross_section_problems(config: RunConfig) -> Iterator[Problem]:
    """Problems between sections, each with its way out."""
    yield from _batch(config)
    yield from _kernels(config)
    yield from _sequence_shards(config)
    try:
        config.data.check_files()
    except ConfigError as error:
        # What follows needs the tokenizer.
        yield from error.problems
        return
    tokenizer_vocab = config.data.tokenizer.vocab_size
    if config.model.vocab_size < tokenizer_vocab:
        rule = f"is smaller than the tokenizer's {tokenizer_vocab}"
        yield Problem("model.vocab_size", config.model.vocab_size, rule, f"use {tokenizer_vocab} or more")
    yield from _shards(config)
    yield from _tables(config)
    yield from hashing_problems(config)
    yield from cluster_problems(config)
    yield from neighbour_problems(config)
    yield from distill_problems(config)


def _batch(config: RunConfig) -> Iterator[Problem]:
    batch, micro = config.data.batch_size, config.train.grad_accumulation
    shards = config.mesh.batch_shards
    if micro >= 1 and shards >= 1 and batch % (micro * shards):
        rule = f"must be a multiple of train.grad_accumulation * mesh.replica * mesh.fsdp * mesh.expert = {micro * shards}"
        below = batch // (micro * shards) * micro * shards
        ways = " or ".join(str(n) for n in (below, below + micro * shards) if n)
        yield Problem("data.batch_size", batch, rule, f"use {ways}")


def _kernels(config: RunConfig) -> Iterator[Problem]:
    """Backends that are asked for by a name that their op does not have."""
    for path, node in walk(config.model, "model"):
        asked = getattr(node, "kernel", None)
        if not isinstance(node, MixerConfig) or node.op is None or asked is None:
            continue
        names = dispatch.selectable(node.op)
        for name in (asked,) if isinstance(asked, str) else asked:
            if name in names:
                continue
            near = difflib.get_close_matches(name, names, n=1)
            ways = (f"did you mean {near[0]!r}? " if near else "") + f"{node.op} has {', '.join(names)}; None takes the best"
            yield Problem(f"{path}.kernel", name, f"is no backend of {node.op}", ways)


def _sequence_shards(config: RunConfig) -> Iterator[Problem]:
    """What cannot be split over sequence shards, or not in the way that is asked for."""
    shards, length = config.mesh.context, config.data.sequence_length
    for path, mixer in walk(config.model, "model"):
        if not isinstance(mixer, SequenceMixerConfig):
            continue
        ways = CROSSINGS.get(mixer.context, ())
        if mixer.exchange is not None and mixer.exchange not in ways:
            rule = f"is no way to split {type(mixer).__name__} over sequence shards"
            yield Problem(f"{path}.exchange", mixer.exchange, rule, f"use {', '.join(ways)}" if ways else "leave it None")
        elif shards > 1 and (mixer.context not in CROSSINGS or mixer.whole_rows()):
            rule = f"splits sequences, and {type(mixer).__name__} ({path}) works on whole ones"
            yield Problem("mesh.context", shards, rule, f"use mesh.context=1, or {mixer.whole_rows() or 'leave that mixer out'}")
    if shards > 1 and length % shards:
        below = length // shards * shards
        fitting = [n for n in range(1, min(length, 2 * shards) + 1) if length % n == 0]
        ways_out = f"use sequences of {below or shards} or {below + shards} tokens, or mesh.context={max(fitting)}"
        yield Problem("data.sequence_length", length, f"must be a multiple of mesh.context = {shards}", ways_out)
    elif shards > 1:
        yield from _attention_shards(config)


def _attention_shards(config: RunConfig) -> Iterator[Problem]:
    """Strategies that are asked for by name and cannot run on a layer's heads, window or row length."""
    mesh = config.mesh
    for path, mixer in walk(config.model, "model"):
        strategy = getattr(mixer, "exchange", None) or mesh.attention
        if not isinstance(mixer, SequenceMixerConfig) or mixer.context != "ring" or strategy not in crossings.STRATEGIES:
            continue
        shape = {**ring_shape(config, mixer), "size": mesh.context}
        why = crossings.refusal(strategy, **shape)
        if why is not None:
            named = f"{path}.exchange" if mixer.exchange else "mesh.attention"
            fitting = [other for other in crossings.STRATEGIES if not crossings.refusal(other, **shape)]
            yield Problem(named, strategy, f"{why} ({path})", f"use {', '.join(fitting)}, or None for the cheapest")


def _tables(config: RunConfig) -> Iterator[Problem]:
    """Settings of sparse tables that fit none of the model's, and tables that are too long for their owners."""
    if collect_problems(config.model) or collect_problems(config.mesh) or collect_problems(config.optimizer):
        return
    whole = config.model.build(config.data.tokenizer.token_strings())
    specs, _ = partition(whole)
    yield from host_table_problems(config, whole)
    yield from (problem.under("optimizer") for problem in table_problems(config.optimizer.table_optimizers, specs))
    yield from too_long(on_devices(config, specs), config.mesh.abstract_rules())


def _shards(config: RunConfig) -> Iterator[Problem]:
    """Sizes that tensor and expert shards must divide, read from the described parameters."""
    if config.mesh.num_devices <= 1 or collect_problems(config.model) or collect_problems(config.mesh):
        return
    rules = config.mesh.abstract_rules()
    specs = config.model.build(config.data.tokenizer.token_strings())
    for axes, shards, rule, ways_out in rules.indivisible(specs):
        yield Problem(f"mesh.{axes}", shards, rule, ways_out)
