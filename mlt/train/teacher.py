"""The runs that a distilled one learns from and starts from: what of them cannot fit, and their arrays."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from mlt.checkpoint.layout import committed_steps
from mlt.checkpoint.restore import restore
from mlt.config.load import load_config
from mlt.config.problems import Problem
from mlt.config.run import RunConfig
from mlt.errors import UserError
from mlt.model.lm import LM
from mlt.nn.param import named_leaves, path_name
from mlt.parallel.rules import Rules
from mlt.run_paths import RunPaths
from mlt.train.distill import Distill, Teacher, frozen, matched_layers
from mlt.train.layer_starts import layer_problems, of_layers


def distill_problems(config: RunConfig) -> Iterator[Problem]:
    """What is wrong with the teacher, with the run that the student starts from, and with what is to be trained."""
    distill = config.train.distill
    if distill is None:
        return
    teacher, problem = _config_of(distill.teacher, "teacher", config)
    if problem is not None:
        yield problem
    if teacher is not None:
        yield from _checkpoint_problems(distill, teacher)
        if distill.match == "outputs":
            yield from (problem.under("model") for problem in matched_layers(config.model, teacher.model)[1])
            if config.model.d_model != teacher.model.d_model:
                rule = f"must be the teacher's {teacher.model.d_model}: its stream is what layers are compared on"
                yield Problem("model.d_model", config.model.d_model, rule, "or match logits")
    if distill.start is not None:
        start, problem = _config_of(distill.start, "start", config)
        if problem is not None:
            yield problem
        elif start is not None and not committed_steps(RunPaths(distill.start).checkpoints_path):
            yield Problem("train.distill.start", distill.start, "has no checkpoint", "train it first")
    if distill.layers is not None:
        yield from _layer_problems(distill, config, teacher)
    names = [name for name, spec in named_leaves(config.model.build(config.data.tokenizer.token_strings())) if spec.trainable]
    if teacher is not None and distill.match == "outputs":
        yield from _idle_problems(distill, names, matched_layers(config.model, teacher.model)[0])
    for i, pattern in enumerate(distill.trained):
        if not any(distill.replace(trained=(pattern,)).trains(name) for name in names):
            ways_out = "mlt check CONFIG --params lists the names"
            yield Problem(f"train.distill.trained[{i}]", pattern, "matches no parameter", ways_out)


def _layer_problems(distill: Distill, config: RunConfig, teacher: RunConfig | None) -> Iterator[Problem]:
    first = teacher
    if distill.start is not None:
        first, _ = _config_of(distill.start, "start", config)
    if first is not None:
        yield from (problem.under("train.distill") for problem in layer_problems(distill, config.model.stack, first.model.stack))


def _idle_problems(distill: Distill, names: list[str], layers: list[tuple[str, int, int]]) -> Iterator[Problem]:
    """Parameters that would be trained though no output that is compared depends on them: decay alone would move them."""
    matched = tuple(f"stack.{part}.{i}.sub_layers.{j}.mixer." for part, i, j in layers)
    idle = [name for name in names if distill.trains(name) and not name.startswith(matched)]
    if layers and idle:
        more = f" and {len(idle) - 1} more" if len(idle) > 1 else ""
        rule = f"trains {idle[0]}{more}, on which no compared output depends"
        ways_out = f'name parameters of the matched mixers, such as ("{matched[0]}*",)'
        yield Problem("train.distill.trained", distill.trained, rule, ways_out)


def _config_of(run_dir: str, field: str, config: RunConfig) -> tuple[RunConfig | None, Problem | None]:
    """The config of a run, or why it cannot be used in this field."""
    path = f"train.distill.{field}"
    try:
        other = load_config(run_dir, root=RunConfig, check=False)
    except UserError as error:
        return None, Problem(path, run_dir, f"cannot be read: {error}", "name the directory of a run")
    ours, theirs = config.data.tokenizer, other.data.tokenizer
    if ours.digest != theirs.digest:
        rule = f"has another tokenizer ({type(theirs).__name__}, {theirs.vocab_size} ids)"
        return other, Problem(path, run_dir, rule, "give data.tokenizer the one of that run")
    if other.model.vocab_size != config.model.vocab_size:
        rule = f"has a vocabulary of {other.model.vocab_size}, this model of {config.model.vocab_size}"
        return other, Problem(path, run_dir, rule, f"set model.vocab_size={other.model.vocab_size}")
    return other, None


def _checkpoint_problems(distill: Distill, teacher: RunConfig) -> Iterator[Problem]:
    steps = committed_steps(RunPaths(distill.teacher).checkpoints_path)
    have = f"its checkpoints are those of steps {', '.join(map(str, steps))}"
    if not steps:
        yield Problem("train.distill.teacher", distill.teacher, "has no checkpoint", "train it first")
    elif distill.step is not None and distill.step not in steps:
        yield Problem("train.distill.step", distill.step, "is no checkpoint of the teacher", have)
    elif distill.step is None and steps[-1] < teacher.train.steps:
        rule = f"must be named: the teacher is at step {steps[-1]} of {teacher.train.steps} and may go on"
        yield Problem("train.distill.step", None, rule, have)


def load_teacher(config: RunConfig, rules: Rules) -> Teacher | None:
    """The teacher of a checked config on the mesh; None where it has none.

    Raises:
        UserError: its parameters do not fit the mesh, or its checkpoint cannot be read.
    """
    distill = config.train.distill
    if distill is None:
        return None
    return Teacher(_restored(distill.teacher, distill.step, rules) if distill.listens else None, distill)


def start_arrays(config: RunConfig, specs: LM, rules: Rules) -> dict[str, jax.Array]:
    """What a fresh student takes from another run, by name, laid out as the student's; empty without a teacher.

    Raises:
        UserError: nothing of that run has the name and shape of a parameter, or it cannot be read.
    """
    distill = config.train.distill
    if distill is None:
        return {}
    places = dict(zip((name for name, _ in named_leaves(specs)), jax.tree.leaves(rules.param_shardings(specs)), strict=True))
    wanted = {name: (spec.shape, spec.dtype, places[name]) for name, spec in named_leaves(specs)}
    run_dir, step = (distill.teacher, distill.step) if distill.start is None else (distill.start, None)
    other = _restored(run_dir, step, rules, wanted)
    found = dict(named_leaves(other))
    if distill.layers is not None:
        found = of_layers(distill.layers, specs, other, places)
    taken = {name: found[name] for name, (shape, dtype, _) in wanted.items() if _fits(found.get(name), shape, dtype)}
    if not taken:
        raise UserError(f"train.distill: {run_dir} has no parameter of a name and shape that the model has to start from")
    return taken


def _fits(array: jax.Array | None, shape: tuple[int, ...], dtype: str) -> bool:
    return array is not None and array.shape == shape and array.dtype == dtype


def _restored(run_dir: str, step: int | None, rules: Rules, wanted: dict[str, Any] | None = None) -> LM:
    """The model of a run's checkpoint, each array where `wanted` says, or where the rules do."""
    other = load_config(run_dir, root=RunConfig)
    specs = other.model.build(tuple(other.data.tokenizer.token_strings()))
    if other.train.distill is not None:
        specs = frozen(specs, other.train.distill)

    def abstract(path: Any, spec: Any, where: Any) -> jax.ShapeDtypeStruct:
        shape, _, place = (wanted or {}).get(path_name(path), (None, None, None))
        return spec.abstract(place if shape == spec.shape else where)

    target = jax.tree_util.tree_map_with_path(abstract, specs, rules.param_shardings(specs))
    return restore(Path(RunPaths(run_dir).checkpoints_path), target, step=step, subtree="model").state
